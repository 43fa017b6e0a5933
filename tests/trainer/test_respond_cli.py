"""dspark-edge respond, as a user meets it: what it writes, that it survives a kill, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dspark_edge.engines.errors import DSparkError, InvalidInputError, MissingDependencyError
from dspark_edge.trainer.responses.cli import parse_samples, respond
from tests.trainer.conftest import WritePrompts

MAIN = "from dspark_edge.runtime.cli import main; main()"
ENTRIES: tuple[dict[str, Any], ...] = (
    *({"domain": "math", "prompt": f"the cat {'sat ' * (number % 3)}on {number}"} for number in range(6)),
    {"domain": "chat", "turns": ["her name", "and then"]},
    {"domain": "chat", "token_ids": [116, 104, 101]},
)
OPTIONS = ("--max-new-tokens", "12", "--wave", "2", "--threads", "1", "--seed", "5")


def run_here(*arguments: str | Path) -> str:
    """The command in this process; returns what it says. Errors come through."""
    done = CliRunner().invoke(respond, [*map(str, arguments)], catch_exceptions=False, standalone_mode=False)
    return done.output


def refused(*arguments: str | Path) -> str:
    """The one line that a refused command says."""
    with pytest.raises(DSparkError) as caught:
        run_here(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def start(arguments: Sequence[str | Path]) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, "respond", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def batch_bundle_dir(text_bundle_dir: Path, bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that decodes four sequences together, with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("batched") / "bundle"
    shutil.copytree(bundle_dir.with_name("qwen3_rnn_decomposed"), folder)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(text_bundle_dir / name, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["limits"]["max_batch"] = 4
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def greedy_answers(path: Path) -> dict[tuple[int, int], tuple[list[int], list[int]]]:
    return {
        (entry["prompt"], entry["turn"]): (entry["prompt_ids"], entry["response_ids"])
        for entry in read(path)
        if entry["temperature"] == 0 and entry["kind"] == "response"
    }


def test_samples_are_parsed() -> None:
    assert parse_samples(()) == ()
    assert parse_samples(("2", "math=3", "a=b=0")) == (("", 2), ("math", 3), ("a=b", 0))
    for wrong in ("", "x", "math=", "math=-1", "1.5", "²", "math=x"):
        with pytest.raises(InvalidInputError, match="expected a number, or a domain and a number: math=2"):
            parse_samples((wrong,))


def test_responses_are_written(text_bundle_dir: Path, write_prompts: WritePrompts, tmp_path: Path) -> None:
    prompts, output = write_prompts([*ENTRIES]), tmp_path / "responses.jsonl"
    arguments = ("--bundle", text_bundle_dir, "--prompts", prompts, "-o", output, *OPTIONS)
    arguments = (*arguments, "--samples", "math=2", "--synthesise", "3", "--greedy-share", "0.6")
    said = run_here(*arguments)
    entries = read(output)
    assert said == f"{output}: {len(entries)} lines\n"
    kinds = [entry["kind"] for entry in entries]
    assert kinds[:3] == ["prompt"] * 3 and kinds.count("response") >= 6 * 2 + 3
    domains = {entry["domain"] for entry in entries if entry["kind"] == "response"}
    assert {"math", "chat"} <= domains <= {"math", "chat", "synthesised"}
    assert {entry["temperature"] for entry in entries} == {0.0, 1.0}
    assert all(1 <= len(entry["response_ids"]) <= 12 for entry in entries)
    later = next(entry for entry in entries if entry["turn"] == 1)
    assert bytes(later["prompt_ids"]).startswith(b"u: her name\na: ") and later["prompt_ids"][-3:] == [97, 58, 32]
    before = output.read_bytes()
    assert run_here(*arguments) == said and output.read_bytes() == before
    assert "other settings" in refused(*arguments[:-1], "0.7")


def test_all_ways_write_the_same_greedy_answers(
    text_bundle_dir: Path, batch_bundle_dir: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    arguments = ("--prompts", write_prompts([*ENTRIES]), *OPTIONS, "--greedy-share", "1")
    found = []
    for name, bundle in (("one", text_bundle_dir), ("batch", batch_bundle_dir)):
        output = tmp_path / f"{name}.jsonl"
        run_here("--bundle", bundle, "-o", output, *arguments)
        found.append(greedy_answers(output))
    assert found[0] == found[1] and len(found[0]) == 9


def test_a_wave_is_what_the_bundle_decodes_together(
    batch_bundle_dir: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    arguments = ("--bundle", batch_bundle_dir, "--prompts", write_prompts([*ENTRIES]), "--max-new-tokens", "8")
    run_here(*arguments, "-o", tmp_path / "default.jsonl")
    run_here(*arguments, "-o", tmp_path / "four.jsonl", "--wave", "4")
    assert (tmp_path / "default.jsonl").read_bytes() == (tmp_path / "four.jsonl").read_bytes()


def test_what_does_not_fit_is_told(text_bundle_dir: Path, write_prompts: WritePrompts, tmp_path: Path) -> None:
    prompts, output = write_prompts([{"prompt": "x" * 300}, {"prompt": "the cat"}]), tmp_path / "responses.jsonl"
    said = run_here("--bundle", text_bundle_dir, "--prompts", prompts, "-o", output, *OPTIONS)
    assert said == f"{output}: 1 lines; 1 were too long and left out\n"


def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    text_bundle_dir: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    entries = [{"prompt": f"the {'cat ' * (number % 5)}{number}"} for number in range(40)]
    prompts, whole = write_prompts(entries), tmp_path / "whole.jsonl"
    arguments = ("--bundle", text_bundle_dir, "--prompts", prompts, *OPTIONS, "--max-new-tokens", "24")
    run_here(*arguments, "-o", whole)
    output = tmp_path / "responses.jsonl"
    size = 0
    for kill in (signal.SIGKILL, signal.SIGTERM):
        with start([*arguments, "-o", output]) as process:
            while not (output.exists() and output.stat().st_size > size + 1500):  # some waves
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.001)
            process.send_signal(kill)
            assert process.wait() == (-9 if kill == signal.SIGKILL else 143)
        assert size < output.stat().st_size < whole.stat().st_size
        size = output.stat().st_size
    assert whole.read_bytes().startswith(output.read_bytes())
    run_here(*arguments, "-o", output)
    assert output.read_bytes() == whole.read_bytes()


def test_two_at_once_are_one_too_many(text_bundle_dir: Path, write_prompts: WritePrompts, tmp_path: Path) -> None:
    prompts, output = write_prompts([{"prompt": f"the cat {number}"} for number in range(500)]), tmp_path / "r.jsonl"
    arguments = ("--bundle", text_bundle_dir, "--prompts", prompts, "-o", output, *OPTIONS)
    with start(arguments) as process:
        while not output.exists() or not output.stat().st_size:
            assert process.poll() is None
            time.sleep(0.001)
        assert refused(*arguments).startswith(f"another process is writing to {output}; ")
        process.kill()
    assert read(output)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "nothing to answer: give --prompts, --synthesise or both"),
        (("--prompts", "missing.jsonl"), "cannot read the prompts missing.jsonl"),
        (("--synthesise", "2", "--samples", "math=2"), "samples are set for the domain 'math', which no prompt has"),
        (("--synthesise", "2", "--samples", "two"), "--samples is 'two'"),
        (("--synthesise", "2", "--threads", "0"), "threads is 0, expected at least 1"),
        (("--synthesise", "2", "--wave", "0"), "wave is 0, expected at least 1"),
        (("--synthesise", "2", "--temperature", "0"), "temperature is 0.0, expected a number above 0"),
        (("--synthesise", "2", "--max-new-tokens", "256"), "expected less than the capacity of 256 tokens"),
        (("--synthesise", "2", "--provider", "none"), "has no none"),
    ],
)
def test_bad_options_are_refused(
    text_bundle_dir: Path, tmp_path: Path, arguments: tuple[str, ...], problem: str
) -> None:
    output = tmp_path / "responses.jsonl"
    assert problem in refused("--bundle", text_bundle_dir, "-o", output, *OPTIONS, *arguments)
    assert not output.exists()


def test_bad_prompts_and_bundles_are_refused(
    bundle_dir: Path, text_bundle_dir: Path, batch_bundle_dir: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    output = tmp_path / "responses.jsonl"
    good, broken = write_prompts([{"prompt": "a"}], "good.jsonl"), write_prompts([{"prompt": "a"}, {}], "broken.jsonl")
    assert "broken.jsonl, line 2: it holds no prompt" in refused(
        "--bundle", text_bundle_dir, "--prompts", broken, "-o", output
    )
    outside = write_prompts([{"prompt": "a"}, {"token_ids": [260]}], "outside.jsonl")
    assert "prompts, line 2: token id 260 is outside the target's vocabulary of 260 tokens" in refused(
        "--bundle", text_bundle_dir, "--prompts", outside, "-o", output, *OPTIONS
    )
    assert "has no tokenizer" in refused("--bundle", bundle_dir, "--prompts", good, "-o", output)
    assert "--wave is 5, the bundle decodes at most 4 sequences together" in refused(
        "--bundle", batch_bundle_dir, "--prompts", good, "-o", output, *OPTIONS, "--wave", "5"
    )
    assert not output.exists()


def test_without_torch_a_target_asks_for_it(
    text_bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"'torch'; install it with: pip install 'dspark-edge\[train\]'"):
        run_here("--bundle", text_bundle_dir, "--synthesise", "1", "-o", tmp_path / "r", *OPTIONS, "--target", "t")


@pytest.mark.needs_export
def test_the_target_in_torch_writes_the_same_greedy_answers(
    text_bundle_dir: Path, reference_dir: Path, write_prompts: WritePrompts, tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="running a target in torch needs the [train] extra")
    arguments = ("--bundle", text_bundle_dir, "--prompts", write_prompts([*ENTRIES]), "--greedy-share", "1", *OPTIONS)
    run_here(*arguments, "-o", tmp_path / "engine.jsonl")
    in_torch = (*arguments, "-o", tmp_path / "torch.jsonl", "--target", reference_dir / "qwen3_target")
    in_torch += ("--compute-type", "fp32")
    run_here(*in_torch)
    assert greedy_answers(tmp_path / "torch.jsonl") == greedy_answers(tmp_path / "engine.jsonl")
    # A file that was begun one way does not go on another way.
    assert "other settings" in refused(*arguments, "-o", tmp_path / "torch.jsonl")
    assert "other settings" in refused(*in_torch, "--compute-type", "bf16")
    assert "--device is 'abacus'" in refused(*in_torch, "--device", "abacus")


@pytest.mark.needs_export
def test_another_target_than_the_bundles_is_refused(text_bundle_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="running a target in torch needs the [train] extra")
    from tests.exporter.conftest import write_target

    other = write_target(tmp_path / "other")  # as large a vocabulary, but smaller
    arguments = ("--bundle", text_bundle_dir, "--synthesise", "1", "-o", tmp_path / "r.jsonl", *OPTIONS)
    problem = refused(*arguments, "--target", other)
    assert "has a hidden_size of 32, the bundle's target one of 96; give the target that the bundle was" in problem


@pytest.mark.needs_export
def test_a_target_needs_no_bundle(text_bundle_dir: Path, write_prompts: WritePrompts, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="running a target in torch needs the [train] extra")
    from tests.exporter.conftest import write_target

    target = write_target(tmp_path / "target")
    openings = tmp_path / "openings.jsonl"
    openings.write_text('{"domain": "code", "prompt": "ab"}\n', encoding="utf-8")
    output = tmp_path / "r.jsonl"
    arguments = ("--target", target, "--compute-type", "fp32", "--synthesise", "6", "--openings", openings, *OPTIONS)
    assert "has no tokenizer" in refused(*arguments, "-o", output)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (text_bundle_dir / name).exists():
            shutil.copy(text_bundle_dir / name, target)
    run_here(*arguments, "-o", output, "--max-length", "200")
    entries = [json.loads(line) for line in output.read_text().splitlines()]
    assert sum(entry["kind"] == "prompt" for entry in entries) == 6
    assert {entry["domain"] for entry in entries} == {"code"}
    assert "whose answers?" in refused("--prompts", write_prompts([*ENTRIES]), "-o", tmp_path / "other")
    without = ("--target", target, "--prompts", write_prompts([*ENTRIES]), "-o", tmp_path / "other")
    assert "say with --synthesise how much" in refused(*without, "--openings", openings)
