"""From rounds to samples: what counts, and what stands behind the end of an answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.runtime import Generation, Generator, Message, SamplingParams
from dspark_edge.runtime.prompts import PromptRecord
from dspark_edge.runtime.round import Draft, Round
from dspark_edge.runtime.statistics import Tally
from dspark_edge.trainer.evaluation.collection import (
    Recorder,
    RoundSample,
    RoundTable,
    answer_turn,
    check_prompts,
    samples_of,
    turn_prompt,
    turn_seed,
)

LOGITS = (0.5, 1.0, 1.5)
PROMPT = tuple(b"the cat sat on")


def round_of(accepted: int, position: int = 10, verify_length: int = 3) -> Round:
    draft = Draft((1, 2, 3), LOGITS, confidences=(0.1, 0.2, 0.3))
    return Round(position, draft, verify_length, accepted + 1, draft_s=0.0, verify_s=0.0)


def answer_of(tokens: int, finish_reason: str) -> Generation:
    return Generation((7,) * tokens, "", finish_reason, (0.0,) * tokens, Tally(1, 0).result(tokens))


def test_a_round_is_a_sample_of_all_it_verified() -> None:
    (sample,) = samples_of([round_of(2)], answer_of(4, "length"))
    assert sample == RoundSample(10, 3, 2, 3, LOGITS, (0.1, 0.2, 0.3))
    (sample,) = samples_of([round_of(1, verify_length=2)], answer_of(3, "length"))
    assert (sample.verified, sample.accepted, sample.logits) == (2, 1, LOGITS[:2])


def test_a_round_that_the_token_limit_cuts_counts_as_a_whole() -> None:
    (sample,) = samples_of([round_of(3)], answer_of(2, "length"))
    assert (sample.verified, sample.accepted, sample.committed) == (3, 3, 4)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (2, (1, 1, 1)),  # the first draft token is the stop: the two behind it were judged for nothing
        (3, (2, 2, 2)),
        (4, (3, 3, 3)),  # the last draft token: the target's own behind it is cut
        (5, (3, 3, 4)),  # the target's own token is the stop: nothing is cut
    ],
)
def test_what_stands_behind_a_stop_token_does_not_count(tokens: int, expected: tuple[int, int, int]) -> None:
    first, last = samples_of([round_of(1), round_of(3)], answer_of(2 + tokens, "stop"))
    assert (first.verified, first.accepted, first.committed) == (3, 1, 2)
    assert (last.verified, last.accepted, last.committed) == expected
    assert last.logits == LOGITS[: expected[0]]


def test_an_answer_without_rounds_has_no_samples() -> None:
    assert samples_of([], answer_of(1, "stop")) == []


def test_rounds_of_a_table() -> None:
    samples = [
        RoundSample(0, 3, 3, 4, LOGITS, None),
        RoundSample(4, 3, 1, 2, LOGITS, None),
        RoundSample(6, 1, 1, 2, LOGITS[:1], None),  # the other positions were not verified
        RoundSample(8, 0, 0, 1, None, None),  # nothing was drafted
    ]
    table = RoundTable.of(samples, 3)
    assert [table.judged(index).sum() for index in range(3)] == [3, 2, 2]
    assert [table.conditional(index).sum() for index in range(3)] == [3, 2, 1]
    assert [table.survived(index).sum() for index in range(3)] == [3, 1, 1]
    assert table.logits is not None and table.logits.tolist() == [[0.5, 1, 1.5], [0.5, 1, 1.5], [0.5, 0, 0], [0, 0, 0]]
    assert table.confidences is None
    assert len(RoundTable.of([], 3)) == 0
    assert table.prompts_of(table.judged(1)) is None
    of_two = RoundTable.of(samples, 3, [5, 5, 5, 9])
    found = of_two.prompts_of(of_two.judged(1))
    assert found is not None and found.tolist() == [5, 5]


def test_a_turn_continues_from_the_answers_before() -> None:
    record = PromptRecord(1, "chat", turns=("a", "b", "c"))
    assert turn_prompt(record, 0, []) == "a"
    assert turn_prompt(record, 2, ["x", "y"]) == [
        Message("user", "a"),
        Message("assistant", "x"),
        Message("user", "b"),
        Message("assistant", "y"),
        Message("user", "c"),
    ]


def test_seeds_differ_by_prompt_and_turn_alone() -> None:
    record = PromptRecord(3, "chat", turns=("a", "b"))
    seeds = {
        turn_seed(seed, one, turn) for seed in (0, 1) for one in (record, replace(record, line=4)) for turn in (0, 1)
    }
    assert len(seeds) == 8
    assert turn_seed(0, record, 1) == turn_seed(0, PromptRecord(3, "other", token_ids=(1,)), 1)


def test_an_observer_sees_every_round(bundle_dir: Path) -> None:
    recorder = Recorder()
    params = SamplingParams(max_new_tokens=40)
    with OnnxRuntimeEngine(Bundle.open(bundle_dir), threads=1) as engine:
        generator = Generator(engine, observer=recorder)
        generation, samples = answer_turn(generator, recorder, PROMPT, params)
    assert tuple(sample.committed for sample in samples) == generation.statistics.accepted_lengths
    position = len(PROMPT)
    for sample in samples:
        assert sample.position == position and sample.logits is not None and len(sample.logits) == sample.verified
        position += sample.committed
    assert recorder.rounds == []


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        (PromptRecord(5, "a", token_ids=(300,)), "line 5: token id 300 is outside the vocabulary"),
        (
            PromptRecord(5, "a", token_ids=(1,) * 257),
            "line 5 has 257 tokens, expected 1 to .* 256",
        ),
        (PromptRecord(5, "a", turns=("text",)), "line 5: the bundle has no tokenizer"),
    ],
)
def test_prompts_are_checked_before_any_is_run(bundle_dir: Path, record: PromptRecord, problem: str) -> None:
    with (
        Generator.open(bundle_dir, threads=1) as generator,
        pytest.raises(InvalidInputError, match=problem),
    ):
        check_prompts(generator, [PromptRecord(1, "a", token_ids=(1,)), record])
