"""benchmarks/peers.py without any peer: order, clock, figures, the result's shape, and what becomes of failures."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import peers
import pytest
from peer_contenders import Clock, Contender, ContenderError, Setup
from peer_report import (
    Run,
    Timing,
    agreement,
    draw,
    first_difference,
    ratio,
    repeatable,
    speeds,
    summarise,
    table,
    turns,
)

from dspark_edge.runtime.prompts import PromptRecord


def run(
    contender: str, repeat: int, prompt: int, token_ids: tuple[int, ...], seconds: float, domain: str = "math"
) -> Run:
    return Run(contender, repeat, prompt, domain, Timing(token_ids, len(token_ids) - 1, seconds))


class Scripted:
    """A contender that answers every prompt with its first token, again and again."""

    def __init__(self, name: str, log: list[str], seconds: float = 1.0, fails_at: int | None = None) -> None:
        self.name, self.log, self.seconds, self.fails_at = name, log, seconds, fails_at
        self.calls = 0

    def __call__(self, prompt: list[int]) -> Timing:
        self.calls += 1
        if self.calls == self.fails_at:
            raise ContenderError("it fell over")
        self.log.append(self.name)
        return Timing((prompt[0],) * 5, 4, self.seconds)


# ------------------------------------------------------------------------------------------------------------ order


def test_everybody_answers_every_prompt_once_a_repeat() -> None:
    order = list(turns(("a", "b", "c"), prompts=4, repeats=3))
    assert [(repeat, prompt) for repeat, prompt, _ in order] == [(r, p) for r in range(3) for p in range(4)]
    assert all(sorted(names) == ["a", "b", "c"] for _, _, names in order)


def test_the_order_rotates_over_prompts_and_repeats() -> None:
    order = {(repeat, prompt): names for repeat, prompt, names in turns(("a", "b", "c"), prompts=3, repeats=3)}
    assert Counter(names[0] for names in order.values()) == {"a": 3, "b": 3, "c": 3}
    for prompt in range(3):  # a prompt meets every order, although prompts are as many as contenders
        assert len({order[repeat, prompt] for repeat in range(3)}) == 3


# ------------------------------------------------------------------------------------------------------------ clock


def ticks(*times: float) -> Any:
    left = list(times)
    return lambda: left.pop(0)


def test_the_clock_counts_from_the_first_tokens_to_the_last() -> None:
    clock = Clock(tokens=6, eos_ids=(), now=ticks(10.0, 10.5, 11.0))
    assert not clock.show([1])
    assert not clock.show([2, 3])
    assert clock.show([4, 5, 6, 7])  # a round's surplus is cut
    assert clock.timing() == Timing((1, 2, 3, 4, 5, 6), 5, 1.0)


def test_the_first_call_may_give_several_tokens() -> None:
    clock = Clock(tokens=4, eos_ids=(), now=ticks(1.0, 3.0))
    clock.show([1, 2, 3])
    clock.show([4])
    assert clock.timing() == Timing((1, 2, 3, 4), 1, 2.0)


def test_the_end_of_text_ends_an_answer() -> None:
    clock = Clock(tokens=9, eos_ids=(0,), now=ticks(1.0, 2.0))
    clock.show([1])
    assert clock.show([2, 0, 3])
    assert clock.timing().token_ids == (1, 2, 0)


def test_a_clock_that_saw_nothing() -> None:
    assert Clock(tokens=9, eos_ids=()).timing() == Timing((), 0, 0.0)


# ---------------------------------------------------------------------------------------------------------- figures


def test_a_repeat_s_speed_is_of_all_its_answers_together() -> None:
    runs = [
        run("a", 0, 0, (1, 2, 3), 1.0),  # 2 tokens in 1 s
        run("a", 0, 1, (1, 2, 3, 4, 5), 1.0),  # 4 in 1 s
        run("a", 1, 0, (1, 2, 3), 0.5),
        run("a", 2, 0, (1,), 0.0),  # nothing to time
    ]
    assert speeds(runs) == [3.0, 4.0]


def test_ratios_are_paired_by_repeat() -> None:
    assert ratio([10.0, 1.0, 30.0], [5.0, 1.0, 10.0]) == 2.0
    assert ratio([], [1.0]) is None


@pytest.mark.parametrize(
    ("one", "other", "index"),
    [((1, 2), (1, 2), None), ((1, 3), (1, 2), 1), ((1,), (1, 2), 1), ((1, 2, 3), (1, 2), 2), ((), (1,), 0)],
)
def test_first_difference(one: tuple[int, ...], other: tuple[int, ...], index: int | None) -> None:
    assert first_difference(one, other) == index


def test_agreement_counts_answers_and_tokens() -> None:
    reference = [run("a", 0, 0, (1, 2, 3), 1.0), run("a", 0, 1, (4, 5, 6), 1.0)]
    runs = [run("b", 0, 1, (4, 9, 6), 1.0), run("b", 0, 0, (1, 2, 3), 1.0), run("b", 1, 0, (7, 7, 7), 1.0)]
    assert agreement(runs, reference) == {
        "identical_answers": 1,
        "answers": 2,
        "agreeing_tokens": 4,
        "tokens": 6,
        "first_difference": [None, 1],
    }
    assert not repeatable(runs)
    assert repeatable(reference)


# -------------------------------------------------------------------------------------------------------- competing


def test_everybody_warms_up_and_that_does_not_count() -> None:
    log: list[str] = []
    contenders = {name: Scripted(name, log) for name in ("a", "b")}
    prompts = [peers.Prompt("math", [7]), peers.Prompt("code", [8])]
    runs, failures = peers.compete(contenders, prompts, 2, lambda line: None)
    assert not failures
    assert log == ["a", "b", "a", "b", "b", "a", "b", "a", "a", "b"]
    assert len(runs) == 8
    assert {(one.prompt, one.domain, one.timing.token_ids[0]) for one in runs} == {(0, "math", 7), (1, "code", 8)}


def test_who_fails_is_reported_and_the_others_go_on() -> None:
    log: list[str] = []
    contenders = {"a": Scripted("a", log), "b": Scripted("b", log, fails_at=3)}
    runs, failures = peers.compete(contenders, [peers.Prompt("math", [7])], 3, lambda line: None)
    assert failures == {"b": "it fell over"}
    assert Counter(one.contender for one in runs) == {"a": 3, "b": 1}
    assert contenders["b"].calls == 3  # never asked again


def test_the_first_prompts_of_each_domain() -> None:
    records = [PromptRecord(line, domain, turns=("?",)) for line, domain in enumerate("aabab", start=1)]
    assert [record.line for record in peers.limited(records, 2)] == [1, 2, 3, 5]
    assert peers.limited(records, None) == records


def test_names_and_references() -> None:
    arguments = argparse.Namespace(
        bundle=["fp32=one", "int4=two"],
        modes=["plain", "static"],
        transformers=Path("model.gguf"),
        genai=["int4=genai-model", "int8=other"],
        llama="SmolLM2.Q4_1.gguf",
        lookup=[3],
    )
    common: dict[str, Any] = {"threads": 1, "context": 64, "tokens": 16, "eos_ids": (2,)}
    setups, references = peers.planned(arguments, common)
    assert references == {
        "ours fp32 plain": "ours fp32 plain",
        "ours fp32 static": "ours fp32 plain",
        "ours int4 plain": "ours int4 plain",
        "ours int4 static": "ours int4 plain",
        "transformers fp32": "ours fp32 plain",
        "transformers fp32 lookup 3": "ours fp32 plain",
        "onnxruntime-genai int4": "ours int4 plain",
        "onnxruntime-genai int8": "ours fp32 plain",
        "llama.cpp Q4_1": "ours fp32 plain",
        "llama.cpp Q4_1 lookup 3": "ours fp32 plain",
    }
    assert setups["llama.cpp Q4_1 lookup 3"] == Setup("llama", "SmolLM2.Q4_1.gguf", lookup=3, **common)
    arguments.bundle = ["same=one", "same=two"]
    with pytest.raises(ValueError, match="NAME=PATH"):
        peers.planned(arguments, common)


# ------------------------------------------------------------------------------------------------------- the result


def example() -> dict[str, Any]:
    runs = [
        run("ours fp32 plain", 0, 0, (1, 2, 3), 1.0),
        run("ours fp32 plain", 1, 0, (1, 2, 3), 2.0),
        run("theirs", 0, 0, (1, 2, 4), 2.0),
        run("theirs", 1, 0, (1, 2, 4), 4.0),
        run("fragile", 0, 0, (1, 2, 3), 1.0),
        run("short", 0, 0, (1,), 0.0),
    ]
    references = dict.fromkeys(("ours fp32 plain", "theirs", "fragile", "missing", "short"), "ours fp32 plain")
    failures = {"fragile": "it fell over", "missing": "No module named 'theirs'"}
    result = summarise(references, runs, failures, ["ours fp32 plain"])
    device = {"processor": "a processor"}
    return {"date": "2026-01-01", "device": device, "versions": {}, "settings": {"threads": 1}, **result}


def test_the_shape_of_the_result() -> None:
    result = json.loads(json.dumps(example()))
    entries = result["contenders"]
    assert entries["theirs"] == {
        "ours": False,
        "status": "ran",
        "tokens_per_second": {"median": 0.75, "min": 0.5, "max": 1.0},
        "by_repeat": [1.0, 0.5],
        "domains": {"math": {"median": 0.75, "min": 0.5, "max": 1.0}},
        "answer_tokens": 3,
        "repeatable": True,
        "compared_with": "ours fp32 plain",
        "agreement": {
            "identical_answers": 0,
            "answers": 1,
            "agreeing_tokens": 2,
            "tokens": 3,
            "first_difference": [2],
        },
    }
    assert entries["fragile"] == {"ours": False, "status": "failed", "error": "it fell over"}
    assert entries["missing"]["status"] == "failed"
    assert entries["short"]["tokens_per_second"] is None
    assert result["ratios_of_ours"] == {"ours fp32 plain": {"theirs": 2.0, "short": None}}


def test_the_table_names_everybody() -> None:
    lines = table(example())
    assert "theirs               0.8 tokens/s (0.5 to 1.0)   0 of 1 answers as ours fp32 plain" in lines
    assert "missing          No module named 'theirs'" in lines
    assert "short            no answer had a second token" in lines
    assert "ours fp32 plain is 2.00x of theirs" in lines


def test_the_chart_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(example(), tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------------------------ a real process


def test_a_contender_that_cannot_start_says_why(tmp_path: Path) -> None:
    setup = Setup("ours", str(tmp_path / "nowhere"), threads=1, context=64, tokens=4, eos_ids=(2,))
    with pytest.raises(ContenderError, match="nowhere"), Contender(setup, patience_s=60):
        pass


def test_a_contender_answers_from_its_own_process() -> None:
    bundle = Path(__file__).parents[1] / "data" / "bundles" / "qwen3_rnn_decomposed"
    setup = Setup("ours", str(bundle), threads=1, context=64, tokens=4, eos_ids=())
    with Contender(setup, patience_s=60) as contender:
        timing = contender.answer([1, 2, 3])
        with pytest.raises(ContenderError, match="empty"):
            contender.answer([])
        with pytest.raises(ContenderError, match="exit code 0"):
            contender.answer([1, 2, 3])
    assert len(timing.token_ids) == 4
    assert timing.following == 3
    assert timing.seconds > 0
