"""dspark-edge profile, as a user meets it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import BundleError, CapacityError, InvalidInputError, MissingDependencyError
from dspark_edge.engines.profile import Profile
from dspark_edge.engines.profile_device import probe_device
from dspark_edge.runtime.cli import cli

QUICK = ("--threads", "1", "--widths", "1,2", "--contexts", "64,128", "--budget", "0.001")
MAIN = "from dspark_edge.runtime.cli import main; main()"


@pytest.fixture
def bundle(bundle_dir: Path, tmp_path: Path) -> Path:
    return shutil.copytree(bundle_dir, tmp_path / "bundle")


@pytest.fixture(autouse=True)
def no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest: only tests that ask for `pictures` have matplotlib."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib", None)


@pytest.fixture
def pictures() -> None:
    pytest.importorskip("matplotlib", reason="the picture needs the [train] extra")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["profile", *map(str, arguments)])


def stored(bundle: Path) -> Profile:
    profile = Profile.load(Bundle.open(bundle), probe_device("cpu", 1))
    assert profile is not None
    return profile


def test_a_bundle_is_measured_and_the_profile_stored(bundle: Path) -> None:
    done = invoke(bundle, *QUICK)
    assert done.exit_code == 0, done.output
    for title in ("Target, ms a call", "Plain step and draft", "Sampler, ms a call", "drawing with filters"):
        assert title in done.stdout
    profile = stored(bundle)
    assert {point.width for point in profile.points["target"]} == {1, 2, 8}  # 1 and γ + 1 always
    folder = bundle / "devices" / profile.device.fingerprint
    assert str(folder / "profile.json") in done.stdout
    assert os.listdir(folder) == ["profile.json"]  # nothing draws a picture here


def test_json_is_the_profile_and_where_it_lies(bundle: Path) -> None:
    done = invoke(bundle, *QUICK, "--json")
    data = json.loads(done.stdout)
    path, picture = data.pop("path"), data.pop("picture")
    assert picture is None
    assert data == json.loads(Path(path).read_text())
    assert set(data["points"]) == {
        "target",
        "drafter",
        "drafter_drawing",
        "sampler_greedy",
        "sampler",
        "sampler_filtered",
    }


def test_the_picture_lies_beside_the_profile_or_where_it_is_wanted(
    bundle: Path, tmp_path: Path, pictures: None
) -> None:
    data = json.loads(invoke(bundle, *QUICK, "--json").stdout)
    assert data["picture"] == data["path"].removesuffix(".json") + ".png"
    assert Path(data["picture"]).read_bytes().startswith(b"\x89PNG\r\n")
    wanted = tmp_path / "costs.png"
    again = json.loads(invoke(bundle, "--show", "--threads", "1", "--json", "--picture", wanted).stdout)
    assert again["picture"] == str(wanted) and wanted.read_bytes() == Path(data["picture"]).read_bytes()
    assert Bundle.open(bundle).verify() == ()  # pictures and profiles are no part of what was exported


def test_a_picture_in_no_folder_is_refused_first(bundle: Path, pictures: None) -> None:
    done = invoke(bundle, *QUICK, "--picture", "no/such/folder.png")
    assert isinstance(done.exception, InvalidInputError)
    assert "cannot write no/such/folder.png" in str(done.exception)
    assert not (bundle / "devices").exists()


@pytest.mark.parametrize("when", ["measuring", "showing"])
def test_a_picture_without_matplotlib_is_refused_first(bundle: Path, tmp_path: Path, when: str) -> None:
    arguments = QUICK if when == "measuring" else ("--show",)
    done = invoke(bundle, *arguments, "--picture", tmp_path / "costs.png")
    assert isinstance(done.exception, MissingDependencyError)
    assert "needs the package 'matplotlib'" in str(done.exception) and "dspark-edge[train]" in str(done.exception)
    assert not (bundle / "devices").exists()


def test_what_is_stored_is_shown(bundle: Path) -> None:
    missing = invoke(bundle, "--show", "--threads", "1")
    assert isinstance(missing.exception, BundleError) and "has no devices/" in str(missing.exception)
    invoke(bundle, *QUICK)
    before = stored(bundle)
    shown = invoke(bundle, "--show", "--threads", "1")
    assert shown.exit_code == 0 and "Target, ms a call" in shown.stdout
    assert "stale" not in shown.stderr
    assert stored(bundle) == before
    replace(before, device=replace(before.device, libraries={"onnxruntime": "1.0.0"})).save(Bundle.open(bundle))
    stale = invoke(bundle, "--show", "--threads", "1")
    assert "Warning: the profile is stale: the version of onnxruntime was 1.0.0 and is" in stale.stderr
    assert "measure it anew with `dspark-edge profile`" in stale.stderr


def test_uneven_measurements_are_told(bundle: Path) -> None:
    invoke(bundle, *QUICK)
    profile = stored(bundle)
    for spread, told in ((0.4, True), (0.1, False)):
        target = tuple(replace(point, spread=spread) for point in profile.points["target"])
        replace(profile, points={**profile.points, "target": target}).save(Bundle.open(bundle))
        assert ("differ by more than 40 %" in invoke(bundle, "--show", "--threads", "1").stderr) is told


def test_batches_get_tables_of_their_own(bundle: Path) -> None:
    invoke(bundle, *QUICK)
    profile = stored(bundle)
    one = {role: tuple(point for point in points if point.batch == 1) for role, points in profile.points.items()}
    both = {
        role: points + tuple(replace(point, batch=4, median_s=3 * point.median_s) for point in points)
        for role, points in one.items()
    }
    replace(profile, points=both).save(Bundle.open(bundle))
    shown = invoke(bundle, "--show", "--threads", "1").stdout
    assert "cached tokens, 1 sequences" in shown and "cached tokens, 4 sequences" in shown


def test_plain_steps_of_batches_are_measured_unasked(bundle: Path) -> None:
    invoke(bundle, *QUICK)
    points = stored(bundle).points
    target = {(point.batch, point.width) for point in points["target"]}
    assert {batch for batch, _ in target} == {1, 2, 4, 8}
    assert {width for batch, width in target if batch > 1} == {1}  # attention of the lowering `ort` takes no more
    assert {point.batch for point in points["drafter"]} == {1}


@pytest.mark.parametrize(
    ("arguments", "error", "problem"),
    [
        (("--widths", "1,x"), InvalidInputError, "--widths is '1,x', expected numbers with commas"),
        (("--widths", "9"), InvalidInputError, "width 9: blocks of 7 drafts are verified at widths 1 to 8"),
        (("--contexts", "300"), CapacityError, "context 300: the bundle's capacity of 256"),
        (("--batches", "0"), InvalidInputError, "batch 0: the bundle was exported for 1 to 1"),
        (("--budget", "0"), InvalidInputError, "the budget is 0.0 s"),
        (("--threads", "0"), InvalidInputError, "threads is 0"),
        (("--show", "--widths", "2", "--budget", "1"), InvalidInputError, "so --widths, --budget would do nothing"),
    ],
)
def test_what_cannot_be_done_is_refused_first(
    bundle: Path, arguments: tuple[str, ...], error: type[Exception], problem: str
) -> None:
    done = invoke(bundle, *arguments)
    assert isinstance(done.exception, error) and problem in str(done.exception)
    assert not (bundle / "devices").exists()


def test_a_bundle_that_cannot_be_written_is_refused_before_anything_is_measured(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / "devices").write_text("in the way")

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr("dspark_edge.runtime.cli.profile.profile_engine", never)
    done = invoke(bundle, *QUICK)
    assert isinstance(done.exception, BundleError) and "cannot write" in str(done.exception)


def test_a_damaged_profile_is_replaced_and_never_shown(bundle: Path) -> None:
    invoke(bundle, *QUICK)
    path = bundle / "devices" / stored(bundle).device.fingerprint / "profile.json"
    path.write_text("{")
    shown = invoke(bundle, "--show", "--threads", "1")
    assert isinstance(shown.exception, BundleError) and "measure it anew" in str(shown.exception)
    assert invoke(bundle, *QUICK).exit_code == 0
    assert stored(bundle).points["target"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_measurement_leaves_the_bundle_as_it_was(bundle: Path, tmp_path: Path, number: signal.Signals) -> None:
    before = sorted(path.relative_to(bundle) for path in bundle.rglob("*"))
    # Says when it is in the middle of measuring; the budget would let it go on for an hour.
    code = (
        "import sys\nfrom dspark_edge.runtime import profile_probe\nrun = profile_probe.StreamProbe.run\n"
        "def told(*given):\n    times = run(*given)\n    print('round', flush=True)\n    return times\n"
        "profile_probe.StreamProbe.run = told\n"
        # Nothing is precise enough to end early.
        "from dspark_edge.runtime import profiling\nprofiling._PRECISE = 0.0\n" + MAIN
    )
    command = [sys.executable, "-c", code, "profile", str(bundle), "--threads", "1", "--budget", "3600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        for _ in range(100):  # behind the warm-up
            assert process.stdout.readline() == "round\n"
        process.send_signal(number)
        process.stdout.read()
        errors = process.stderr.read()
        process.wait()
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert errors.strip() == ("Interrupted." if number == signal.SIGINT else "")
    assert sorted(path.relative_to(bundle) for path in bundle.rglob("*")) == before


def test_it_runs_without_torch_and_matplotlib(bundle: Path) -> None:
    code = (
        "import sys\nclass Refuse:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'onnx', 'matplotlib', 'safetensors', 'transformers'):\n"
        "            raise ImportError(f'{name} is blocked', name=name.split('.')[0])\n"
        "sys.meta_path.insert(0, Refuse())\n" + MAIN
    )
    command = [sys.executable, "-c", code, "profile", str(bundle), *QUICK]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert stored(bundle).draft_s(1, 64) > 0
