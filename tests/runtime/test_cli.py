"""The command line, as a user meets it: exit codes, one-line errors, JSON."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

MAIN = "from dspark_edge.runtime.cli import main; main()"


def run(*arguments: str | Path, stdin: str = "", **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", MAIN, *map(str, arguments)], input=stdin, capture_output=True, text=True, **kwargs
    )


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused command prints."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_help_lists_the_commands_without_importing_them() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in (
        "export",
        "inspect",
        "parity",
        "plan",
        "build",
        "generate",
        "chat",
        "profile",
        "bench",
        "respond",
        "train",
        "evaluate",
        "calibrate",
        "doctor",
    ):
        assert command in done.stdout


def test_generate_prints_one_json_object_a_prompt(bundle_dir: Path, record: Any, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    samples = record["samples"][:3]
    prompts.write_text("".join(json.dumps({"token_ids": sample["prompt"]}) + "\n\n" for sample in samples))
    done = run("generate", bundle_dir, "--prompts", prompts, "--max-new-tokens", "64", "--json", "--log-probs")
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 3
    for answer, sample in zip(answers, samples, strict=True):
        assert answer["token_ids"] == sample["output"][len(sample["prompt"]) :]
        assert (answer["finish_reason"], answer["text"]) == ("length", "")
        assert len(answer["log_probs"]) == 64
        stats = answer["stats"]
        assert stats["rounds"] == len(stats["accepted_lengths"])
        assert stats["accepted_lengths"] == sample["acceptance_lengths"][: stats["rounds"]]
        for name in ("draft_tokens", "time_to_first_token_s", "tokens_per_second", "draft_s", "verify_s", "host_s"):
            assert stats[name] >= 0


def test_bit_exact_answers_are_the_same_in_all_modes(bundle_dir: Path) -> None:
    given = ("generate", bundle_dir, "--token-ids", "104,101", "--max-new-tokens", "24", "--bit-exact")
    answers = [json.loads(run(*given, "--json", "--log-probs", "--mode", mode).stdout) for mode in ("plain", "static")]
    for name in ("token_ids", "log_probs"):
        assert answers[0][name] == answers[1][name]
    refused = error_of(run(*given, "--prefill-chunk", "32"))
    assert "prefill_chunk is 32, but bit_exact fixes it at 64" in refused


def test_generate_streams_ids_where_there_is_no_tokenizer(bundle_dir: Path, record: Any) -> None:
    sample = record["samples"][0]
    ids = ",".join(map(str, sample["prompt"]))
    done = run("generate", bundle_dir, "--token-ids", ids, "--max-new-tokens", "8", "--mode", "plain")
    assert [int(part) for part in done.stdout.split()] == sample["output"][len(sample["prompt"]) :][:8]
    assert "8 tokens" in done.stderr and "accepted length 1.00" in done.stderr


def test_generate_streams_text(text_bundle_dir: Path) -> None:
    streamed = run("generate", text_bundle_dir, "--prompt", "the cat", "--max-new-tokens", "20")
    as_json = run("generate", text_bundle_dir, "--prompt", "the cat", "--max-new-tokens", "20", "--json")
    assert streamed.stdout == json.loads(as_json.stdout)["text"] + "\n"
    raw = run("generate", text_bundle_dir, "--prompt", "the cat", "--max-new-tokens", "20", "--raw", "--json")
    assert json.loads(raw.stdout)["stats"]["prompt_tokens"] == len("the cat")


def test_sampling_options_reach_the_sampler(text_bundle_dir: Path) -> None:
    def sample(*options: str) -> Any:
        fixed = ("--prompt", "the cat", "--max-new-tokens", "30", "--json")
        return json.loads(run("generate", text_bundle_dir, *fixed, *options).stdout)["token_ids"]

    greedy = sample()
    assert sample("--temperature", "1", "--seed", "4") == sample("--temperature", "1", "--seed", "4") != greedy
    assert sample("--temperature", "1", "--seed", "4", "--top-k", "1") == greedy


def test_chat_keeps_the_conversation(text_bundle_dir: Path) -> None:
    done = run(
        "chat", text_bundle_dir, "--max-new-tokens", "12", stdin="the cat\n\nthe dog\n/reset\nthe cat\n/exit\nno\n"
    )
    assert done.returncode == 0
    first, second, again = done.stdout.removesuffix("\n").split("\n")
    assert first == again and len(second) == 12
    assert done.stderr.count("tokens/s") == 3


def test_inspect_shows_and_verifies(bundle_dir: Path) -> None:
    shown = run("inspect", bundle_dir, "--verify")
    assert shown.returncode == 0
    assert "Qwen3ForCausalLM" in shown.stdout and "match their hashes" in shown.stdout
    as_json = json.loads(run("inspect", bundle_dir, "--json", "--verify").stdout)
    assert as_json["verified"] is True and as_json["drafter"]["block_size"] == 7


def test_inspect_shows_a_draft_vocabulary(bundle_dir: Path, tmp_path: Path) -> None:
    drafting = tmp_path / "bundle"
    shutil.copytree(bundle_dir, drafting)
    manifest = json.loads((drafting / "manifest.json").read_text())
    assert "drafts" not in run("inspect", bundle_dir).stdout
    manifest["drafter"]["draft_vocab_size"] = 100
    (drafting / "manifest.json").write_text(json.dumps(manifest))
    assert "drafts 100 of the 260 tokens" in " ".join(run("inspect", drafting).stdout.split())


def test_inspect_finds_a_flipped_bit(bundle_dir: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "bundle"
    shutil.copytree(bundle_dir, damaged)
    data = bytearray((damaged / "target.onnx.data").read_bytes())
    data[1000] ^= 1
    (damaged / "target.onnx.data").write_bytes(data)
    assert run("inspect", damaged).returncode == 0
    assert "target.onnx.data" in error_of(run("inspect", damaged, "--verify"))


def test_doctor_reports() -> None:
    assert "ONNX Runtime" in run("doctor").stdout
    assert {job["name"] for job in json.loads(run("doctor", "--json").stdout)["jobs"]} >= {"cpu", "export"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "give exactly one of --prompt, --token-ids and --prompts; given: none"),
        (("--prompt", "a", "--token-ids", "1"), "given: --prompt, --token-ids"),
        (("--token-ids", "1,x"), "expected numbers with commas"),
        (("--token-ids", "1,260"), "260 is outside the vocabulary"),
        (("--token-ids", ","), "the prompt is empty"),
        (("--prompt", "text"), "the bundle has no tokenizer"),
        (("--token-ids", "1", "--temperature", "-1"), "temperature is -1.0"),
        (("--token-ids", "1", "--verify-length", "9"), "verify_length is 9"),
        (("--token-ids", ",".join(["1"] * 300)), "the prompt has 300 tokens, the bundle's capacity is 256"),
        (("--token-ids", "1", "--threads", "0"), "threads is 0"),
        (("--prompts", "no-such-file.jsonl"), "cannot read the prompts no-such-file.jsonl"),
    ],
)
def test_generate_refuses_in_one_line(bundle_dir: Path, arguments: tuple[str, ...], problem: str) -> None:
    assert problem in error_of(run("generate", bundle_dir, *arguments))


@pytest.mark.parametrize("line", ["{", "[]", '{"x": 1}', '{"turns": []}', '{"prompt": 3}', '{"token_ids": ["a"]}'])
def test_a_broken_line_of_prompts_is_named(bundle_dir: Path, tmp_path: Path, line: str) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"token_ids": [1]}\n' + line + "\n")
    assert "prompts.jsonl, line 2:" in error_of(run("generate", bundle_dir, "--prompts", prompts))


def test_an_empty_prompts_file_is_refused(bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n")
    assert "holds no prompts" in error_of(run("generate", bundle_dir, "--prompts", tmp_path / "prompts.jsonl"))


@pytest.mark.parametrize("command", [("generate", "--token-ids", "1"), ("inspect",), ("chat",)])
@pytest.mark.parametrize("damage", ["missing", "empty", "newer", "incomplete", "outside"])
def test_damaged_bundles_are_refused_in_one_line(
    bundle_dir: Path, tmp_path: Path, command: tuple[str, ...], damage: str
) -> None:
    folder = tmp_path / "bundle"
    if damage == "empty":
        folder.mkdir()
    elif damage != "missing":
        shutil.copytree(bundle_dir, folder)
        manifest = folder / "manifest.json"
        if damage == "newer":
            manifest.write_text(manifest.read_text().replace('"schema_version": 1', '"schema_version": 2'))
        elif damage == "outside":
            manifest.write_text(manifest.read_text().replace('"target.onnx"', '"../target.onnx"'))
        else:
            with open(folder / "drafter.onnx", "r+b") as file:
                file.truncate(100)
    message = error_of(run(command[0], folder, *command[1:]))
    expected = {
        "missing": "bundle",
        "empty": "manifest.json",
        "newer": "newer version",
        "incomplete": "drafter.onnx",
        "outside": "points outside its folder",
    }
    assert expected[damage] in message


def test_wrong_usage_exits_with_2() -> None:
    assert run("generate", "bundle", "--no-such-option").returncode == 2
    assert run("no-such-command").returncode == 2


def long_generate(bundle_dir: Path, tmp_path: Path) -> subprocess.Popen[str]:
    """A generation of thousands of prompts, under way."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"token_ids": [104, 105]}\n' * 5000)
    command = [sys.executable, "-c", MAIN, "generate", str(bundle_dir), "--prompts", str(prompts), "--json"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_interrupt_ends_generate_quietly(bundle_dir: Path, tmp_path: Path) -> None:
    with long_generate(bundle_dir, tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.stderr.read().strip() == "Interrupted."
        assert process.wait() == 130


def test_a_reader_that_leaves_is_no_error(bundle_dir: Path, tmp_path: Path) -> None:
    with long_generate(bundle_dir, tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1
