"""dspark-edge bench, as a user meets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.bench import bench as bench_module
from dspark_edge.runtime.bench.contenders import ModelContender, Run
from dspark_edge.runtime.cli import cli

PROMPTS = (
    {"domain": "math", "token_ids": [3, 1, 4, 1, 5]},
    {"domain": "math", "token_ids": [2, 7, 1, 8]},
    {"domain": "chat", "token_ids": [1, 6, 1, 8, 0, 3]},
)
QUICK = ("--threads", "1", "--max-new-tokens", "6", "--repeats", "2")


@pytest.fixture(scope="module")
def profiled(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = shutil.copytree(bundle_dir, tmp_path_factory.mktemp("bench") / "bundle")
    options = ("--threads", "1", "--widths", "1,2", "--contexts", "64", "--budget", "0.001")
    done = CliRunner().invoke(cli, ["profile", str(bundle), *options])
    assert done.exit_code == 0, done.output
    return bundle


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    return path


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["bench", *map(str, arguments)])


def test_every_combination_is_a_cell(profiled: Path, prompts: Path) -> None:
    done = invoke(
        profiled,
        "--prompts",
        prompts,
        "--random",
        "1",
        "--concurrency",
        "1,2",
        "--temperatures",
        "0,1",
        *QUICK,
        "--json",
    )
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout)
    names = ("mode", "concurrency", "domain", "temperature")
    found = [tuple(cell[name] for name in names) for cell in report["cells"]]
    expected = {
        (mode, concurrency, domain, temperature)
        for mode in ("plain", "static", "scheduled")
        for concurrency in (1, 2)
        for domain in ("math", "chat", "random")
        for temperature in (0, 1)
    }
    assert len(found) == len(expected) and set(found) == expected
    assert report["lossless"] is True and not report["interrupted"]
    for cell in report["cells"]:
        assert cell["precision"] == "fp32" and cell["tokens_per_second"] > 0
        assert (cell["same_answers"] is None) == (cell["temperature"] > 0)
        assert 1 <= cell["mean_concurrency"] <= cell["concurrency"]
        if cell["mode"] == "plain":
            assert cell["accepted_length"] == 1 and cell["parked_share"] == 1 and cell["speedup"] is None
        elif cell["mode"] == "static":
            assert cell["parked_share"] < 0.5
        else:
            assert cell["prediction_error"] is not None
    ratios = [cell["of_best"] for cell in report["cells"] if cell["mode"] == "scheduled"]
    assert ratios == sorted(ratios)
    assert report["settings"]["prompts"] == {"math": 2, "chat": 1}


def test_a_table_and_a_page(profiled: Path, prompts: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the page needs the [train] extra")
    page = tmp_path / "report.html"
    modes = "plain,static:2,scheduled"
    done = invoke(profiled, "--prompts", prompts, "--limit", "1", "--modes", modes, *QUICK, "--html", page)
    assert done.exit_code == 0, done.output
    assert "Worst first" in done.stdout and "static:2" in done.stdout
    html = page.read_text()
    assert html.count("<img") == 1 and "Scheduled decoding is at worst" in html


def test_a_contender_that_changes_tokens_is_told(
    profiled: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(ModelContender):
        def run(self, *arguments: Any) -> Run:
            found = super().run(*arguments)
            if self.mode.name == "static":
                object.__setattr__(found, "answers", tuple((*answer[:-1], 0) for answer in found.answers))
            return found

    monkeypatch.setattr(bench_module, "ModelContender", Wrong)
    done = invoke(profiled, "--prompts", prompts, "--modes", "plain,static", *QUICK)
    assert done.exit_code == 1
    assert "Warning: static, fp32, math" in done.stderr and "not plain decoding's" in done.stderr


def test_what_was_measured_before_an_interruption_is_reported(
    profiled: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(ModelContender):
        runs = 0

        def run(self, *arguments: Any) -> Run:
            type(self).runs += 1
            if type(self).runs > 2 + 2 * 2 * 2:  # the warm-up, and the two prompts of the first domain
                raise KeyboardInterrupt
            return super().run(*arguments)

    monkeypatch.setattr(bench_module, "ModelContender", Interrupted)
    done = invoke(profiled, "--prompts", prompts, "--modes", "plain,static", *QUICK, "--json")
    assert done.exit_code == 130
    report = json.loads(done.stdout)
    assert report["interrupted"] and {cell["domain"] for cell in report["cells"]} == {"math"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--modes", "plain,fast"), "unknown mode 'fast'"),
        (("--modes", "plain:2"), "unknown mode 'plain:2'"),
        (("--modes", "plain,plain"), "modes is plain,plain, expected one or more, each once"),
        (("--modes", "static:9"), "verify_length is 9, the drafter's block has 7"),
        (("--concurrency", "1,x"), "--concurrency is '1,x', expected numbers"),
        (("--concurrency", "1.5"), "--concurrency is '1.5', expected whole numbers"),
        (("--concurrency", "0"), "concurrency is 0, expected 1 or more"),
        (("--temperatures", "-1"), "temperature is -1.0, expected 0 or more"),
        (("--max-new-tokens", "1"), "max_new_tokens is 1, expected 2 or more"),
        (("--repeats", "0"), "repeats is 0"),
        (("--max-new-tokens", "300"), "no prompt of the domain 'math' leaves room for 300 new tokens"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    profiled: Path, prompts: Path, arguments: tuple[str, ...], problem: str
) -> None:
    done = invoke(profiled, "--prompts", prompts, "--threads", "1", *arguments)
    assert isinstance(done.exception, InvalidInputError) and problem in str(done.exception)


def test_prompts_are_needed(profiled: Path) -> None:
    done = invoke(profiled)
    assert isinstance(done.exception, InvalidInputError) and "there is nothing to answer" in str(done.exception)


def test_scheduling_needs_a_profile(bundle_dir: Path, prompts: Path) -> None:
    done = invoke(bundle_dir, "--prompts", prompts, *QUICK)
    assert isinstance(done.exception, InvalidInputError) and "run: dspark-edge profile" in str(done.exception)
