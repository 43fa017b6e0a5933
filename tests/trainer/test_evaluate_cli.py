"""dspark-edge evaluate and calibrate, as a user meets them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dspark_edge.engines.errors import DSparkError
from dspark_edge.runtime.reporting import html_page
from dspark_edge.trainer.evaluation import cli as evaluate_cli
from dspark_edge.trainer.evaluation import evaluate, html

MAIN = "from dspark_edge.runtime.cli import main; main()"
# Evaluation and calibration run on devices: without torch, and without matplotlib unless a page is asked for.
LIGHT = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "matplotlib", "safetensors"):
            raise ImportError(f"{name} is blocked", name=name.split(".")[0])
sys.meta_path.insert(0, Refuse())
"""
MEASURES = {
    "prompts", "turns", "rounds", "new_tokens", "draft_tokens", "accepted_length", "tokens_per_round",
    "acceptance_rate", "acceptance_by_position", "conditional_acceptance_by_position", "rounds_by_position",
    "samples_by_position", "acceptance_by_depth", "confidence_samples", "ece", "auroc", "brier", "ece_by_position",
    "ece_uncorrected_by_position", "ece_noise_by_position", "auroc_by_position", "brier_by_position",
    "survival_ece_by_position", "reliability", "ece_calibrated", "auroc_calibrated", "brier_calibrated",
    "ece_by_position_calibrated", "ece_uncorrected_by_position_calibrated", "ece_noise_by_position_calibrated",
    "auroc_by_position_calibrated", "brier_by_position_calibrated", "survival_ece_by_position_calibrated",
    "reliability_calibrated", "tokens_per_second", "tokens_per_second_median", "plain_tokens_per_second",
    "plain_tokens_per_second_median", "speedup", "speedup_median", "different_answers",
}  # fmt: skip


def run(*arguments: str | Path, light: bool = True) -> subprocess.CompletedProcess[str]:
    code = (LIGHT if light else "") + MAIN
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.fixture
def prompts(write_prompts: Callable[..., Path], reference_prompts: list[Any]) -> Path:
    return write_prompts(reference_prompts)


def test_calibrate_then_evaluate(bundle_copy: Path, prompts: Path) -> None:
    done = run("calibrate", bundle_copy, "--prompts", prompts, "--max-new-tokens", "80", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "Sampled at temperature 0," in done.stdout and "Sampled at temperature 1," in done.stdout
    assert "have fewer than 500 samples" in done.stderr
    options = ("--prompts", prompts, "--max-new-tokens", "40", "--threads", "1", "--limit", "4")
    done = run("evaluate", bundle_copy, *options, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("Warning: the calibration was fitted on 4 of these 4 prompts")
    report = json.loads(done.stdout)
    assert report["calibration"]["repeated_prompts"] == 4
    assert report["lossless"] is True and report["differences"] == []
    assert list(report["domains"]) == ["prose", "code"]
    for measures in (report["overall"], *report["domains"].values()):
        assert set(measures) == MEASURES
        assert len(measures["ece_by_position_calibrated"]) == 7
        assert 1 <= measures["accepted_length"] <= 8 and measures["speedup"] > 0
    assert report["settings"]["max_new_tokens"] == 40 and report["settings"]["threads"] == 1
    assert report["versions"]["onnxruntime"] and report["bundle"]["block_size"] == 7
    shown = run("inspect", bundle_copy).stdout
    assert "calibration" in shown and "on 8 prompts" in shown
    assert json.loads(run("inspect", bundle_copy, "--json").stdout)["calibration"]["fits"]


def test_evaluate_shows_tables(bundle_dir: Path, prompts: Path) -> None:
    options = ("--prompts", prompts, "--max-new-tokens", "24", "--threads", "1", "--limit", "2")
    done = run("evaluate", bundle_dir, *options)
    assert (done.returncode, done.stderr) == (0, "")
    for text in (
        "By domain",
        "prose",
        "code",
        "overall",
        "By position in the draft",
        "AUROC",
        "By depth in the context",
    ):
        assert text in done.stdout
    assert "all 2 answers are those of plain decoding" in done.stdout
    sampled = run("evaluate", bundle_dir, *options, "--temperature", "1", "--seed", "3", "--no-plain", "--json")
    again = run("evaluate", bundle_dir, *options, "--temperature", "1", "--seed", "3", "--no-plain", "--json")
    one, other = (json.loads(done.stdout) for done in (sampled, again))
    assert one["lossless"] is None and one["calibration"] is None and one["overall"]["plain_tokens_per_second"] is None
    timed = ("tokens_per_second", "tokens_per_second_median")
    for measures in (one["overall"], other["overall"]):
        assert all(measures.pop(name) > 0 for name in timed)
    assert one["overall"] == other["overall"]


def test_the_page_needs_nothing_else(bundle_dir: Path, write_prompts: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the page's figures need the [train] extra")
    prompts = write_prompts([{"domain": "$x_<b>", "token_ids": [104, 105]}, {"domain": "_y", "token_ids": [104]}])
    page = tmp_path / "report.html"
    done = run("evaluate", bundle_dir, "--prompts", prompts, "--max-new-tokens", "24", "--html", page, light=False)
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and "$x_&lt;b&gt;" in text and "<b>" not in text
    images = re.findall(r'<img alt="([^"]+)" src="data:image/svg\+xml;base64,', text)
    assert images == [
        "Acceptance by position",
        "Conditional acceptance by position",
        "Reliability diagram",
        "Accepted length by depth in the context",
    ]
    assert not re.search(r'(src|href)="(?!data:)', text) and "<script" not in text


def test_a_missing_matplotlib_is_said_before_anything_runs(bundle_dir: Path, prompts: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    message = error_of(run("evaluate", bundle_dir, "--prompts", prompts, "--html", page))
    assert "an HTML report needs the package 'matplotlib'" in message and "dspark-edge[train]" in message
    assert not page.exists()


def test_an_answer_that_differs_is_exit_code_1(
    bundle_dir: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(*arguments: Any) -> evaluate.Evaluation:
        found = evaluate.evaluate(*arguments)
        first = found.results[0]
        other = dataclasses.replace(first.static, token_ids=(9, *first.static.token_ids[1:]))
        return dataclasses.replace(found, results=(dataclasses.replace(first, plain=other), *found.results[1:]))

    monkeypatch.setattr(evaluate_cli, "evaluate", spoiled)
    options = ["--prompts", str(prompts), "--limit", "2", "--max-new-tokens", "8", "--threads", "1"]
    done = CliRunner().invoke(evaluate_cli.evaluate_command, [str(bundle_dir), *options])
    assert done.exit_code == 1
    assert "line 1, turn 1 differs at token 0: plain 9" in done.output
    assert "1 of 2 answers differ from plain decoding" in done.output
    sampled = CliRunner().invoke(evaluate_cli.evaluate_command, [str(bundle_dir), *options, "--temperature", "1"])
    assert sampled.exit_code == 0


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_both_refuse_in_one_line(bundle_copy: Path, write_prompts: Callable[..., Path], command: str) -> None:
    good = write_prompts([{"token_ids": [104]}])
    assert "is not a bundle" in error_of(run(command, bundle_copy.parent, "--prompts", good))
    for arguments, problem in (
        (("--prompts", "missing.jsonl"), "cannot read the prompts missing.jsonl"),
        (("--prompts", str(good), "--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("--prompts", str(good), "--temperature", "-1"), "temperature is -1.0"),
        (("--prompts", str(good), "--threads", "0"), "threads is 0"),
        (("--prompts", str(good), "--provider", "tpu"), "this ONNX Runtime has no tpu"),
        (
            ("--prompts", str(write_prompts([{"token_ids": [104]}, {"token_ids": []}], "bad.jsonl"))),
            "bad.jsonl, line 2: ",
        ),
        (
            ("--prompts", str(write_prompts([{"token_ids": [104]}, {"token_ids": [999]}], "ids.jsonl"))),
            "the prompt in line 2: token id 999",
        ),
    ):
        called = getattr(evaluate_cli, f"{command}_command")
        done = CliRunner().invoke(called, [str(bundle_copy), *arguments])
        assert isinstance(done.exception, DSparkError) and problem in str(done.exception)


def test_a_page_that_cannot_be_written_is_said_before_anything_runs(
    bundle_dir: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(html_page, "require_matplotlib", lambda: None)
    monkeypatch.setattr(evaluate_cli, "evaluate", None)
    for page in (tmp_path, tmp_path / "gone" / "report.html"):
        arguments = [str(bundle_dir), "--prompts", str(prompts), "--html", str(page)]
        done = CliRunner().invoke(evaluate_cli.evaluate_command, arguments)
        assert "cannot write" in str(done.exception)


def test_calibrating_ngram_is_refused(bundle_dir: Path, prompts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle_dir, tmp_path / "ngram"))
    manifest = json.loads((folder / "manifest.json").read_text())
    facts = dict.fromkeys(manifest["drafter"], 0) | {"kind": "ngram", "block_size": 7, "tap_layers": []}
    manifest["drafter"] = facts | {"markov_head": "none", "mask_token_id": None, "confidence": False}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "drafts with ngram, which has no confidences" in error_of(run("calibrate", folder, "--prompts", prompts))
    done = run("evaluate", folder, "--prompts", prompts, "--limit", "1", "--max-new-tokens", "24", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["overall"]["ece"] is None


def test_matplotlib_is_asked_for_where_it_is_used() -> None:
    assert "matplotlib" not in vars(html)
