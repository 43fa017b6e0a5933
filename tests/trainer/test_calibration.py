"""Calibrating a bundle: what is written, what a killed run leaves, what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import BundleError, InvalidInputError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.prompts import PromptRecord, hash_prompts, read_prompt_records
from dspark_edge.trainer.evaluation.calibration import CalibrationOptions, calibrate, check_calibratable
from dspark_edge.trainer.evaluation.calibration_record import CalibrationRecord
from dspark_edge.trainer.evaluation.collection import RoundSample
from tests.trainer.conftest import reference_entries

MAIN = "from dspark_edge.runtime.cli import main; main()"
OPTIONS = CalibrationOptions(max_new_tokens=80)
WORK = ".calibration.json.work-*"


@pytest.fixture
def records(write_prompts: Callable[..., Path], reference_prompts: list[Any]) -> list[PromptRecord]:
    return read_prompt_records(write_prompts(reference_prompts))


def run(folder: Path, records: list[PromptRecord], options: CalibrationOptions = OPTIONS, **kwargs: Any) -> bytes:
    with OnnxRuntimeEngine(Bundle.open(folder), threads=1) as engine:
        calibrate(engine, records, options, **kwargs)
    return (folder / "calibration.json").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(bundle_dir: Path, record: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The calibration of a run from start to end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(entry) + "\n" for entry in reference_entries(record)))
    return run(Path(shutil.copytree(bundle_dir, folder / "bundle")), read_prompt_records(prompts))


def test_a_calibration_is_written_into_the_bundle(bundle_copy: Path, records: list[PromptRecord]) -> None:
    progress: list[tuple[int, int]] = []
    before = set(os.listdir(bundle_copy))
    content = run(bundle_copy, records, report=lambda done, total: progress.append((done, total)))
    bundle = Bundle.open(bundle_copy)
    calibration = Calibration.load(bundle)
    assert calibration is not None and json.loads(content) == calibration.to_json()
    assert set(os.listdir(bundle_copy)) == before | {"calibration.json"}
    assert bundle.verify() == ()
    assert progress == [(done, 16) for done in range(17)]
    assert [fit.sampling_temperature for fit in calibration.fits] == [0.0, 1.0]
    for fit in calibration.fits:
        assert fit.samples[0] > 100 and sorted(fit.samples, reverse=True) == list(fit.samples)
    # The head was trained on chances of sampling: greedy decoding accepts far more often than it says.
    assert calibration.fits[0].scaling != calibration.fits[1].scaling
    before_survival, after_survival = calibration.fits[0].survival_ece_before, calibration.fits[0].survival_ece_after
    assert sum(error or 0 for error in after_survival) < 0.7 * sum(error or 0 for error in before_survival)
    assert calibration.data.sha256 == hash_prompts(records)
    assert set(calibration.data.prompt_digests) == {record.digest for record in records}


@pytest.mark.parametrize("stop_after", [1, 5, 16])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(
    bundle_copy: Path, records: list[PromptRecord], uninterrupted: bytes, stop_after: int
) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(bundle_copy, records, report=interrupt)
    assert not (bundle_copy / "calibration.json").exists()
    (work,) = bundle_copy.glob(WORK)
    with open(work, "ab") as file:  # a kill in the middle of a line
        file.write(b'{"prompt":15,"temperature":1.0,"rounds":[[7,1,[0.')
    done: list[int] = []
    assert run(bundle_copy, records, report=lambda count, total: done.append(count)) == uninterrupted
    assert done[:1] == ([stop_after] if stop_after < 16 else [])
    assert not list(bundle_copy.glob(WORK))


def test_a_killed_process_loses_little(
    bundle_copy: Path, records: list[PromptRecord], uninterrupted: bytes, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", MAIN, "calibrate", str(bundle_copy), "--prompts", str(tmp_path / "prompts.jsonl")]
    command += ["--max-new-tokens", "80", "--threads", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not any(work.read_bytes().count(b"\n") > 2 for work in bundle_copy.glob(WORK)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not (bundle_copy / "calibration.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (bundle_copy / "calibration.json").read_bytes() == uninterrupted
    assert json.loads(done.stdout) == json.loads(uninterrupted)


def test_a_complete_record_is_fitted_without_running_anything(
    bundle_copy: Path,
    records: list[PromptRecord],
    uninterrupted: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any) -> None:
        raise BundleError("no space")

    with monkeypatch.context() as patched:
        patched.setattr("dspark_edge.trainer.evaluation.calibration.replace_file", fail)
        with pytest.raises(BundleError, match="no space"):
            run(bundle_copy, records, work=tmp_path / "work.jsonl")
    monkeypatch.setattr("dspark_edge.trainer.evaluation.calibration.Generator", None)
    assert run(bundle_copy, records, work=tmp_path / "work.jsonl") == uninterrupted
    assert not (tmp_path / "work.jsonl").exists()


def test_a_damaged_calibration_is_replaced(
    bundle_copy: Path, records: list[PromptRecord], uninterrupted: bytes
) -> None:
    (bundle_copy / "calibration.json").write_text("{")
    assert run(bundle_copy, records) == uninterrupted


def test_other_settings_are_another_run(bundle_copy: Path, records: list[PromptRecord], tmp_path: Path) -> None:
    work = tmp_path / "work.jsonl"

    def interrupt(done: int, total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(bundle_copy, records, work=work, report=interrupt)
    kept = work.read_bytes()
    for options, chosen in ((dataclasses.replace(OPTIONS, seed=1), records), (OPTIONS, records[:7])):
        with pytest.raises(InvalidInputError, match=r"work.jsonl is no record of this calibration .*; delete it"):
            run(bundle_copy, chosen, options, work=work)
    assert work.read_bytes() == kept


@pytest.mark.parametrize("content", [b"precious", b"precious\n", b'{"a": 1}\n{"b": 2}\n'])
def test_a_file_that_is_no_record_is_left_alone(
    bundle_copy: Path, records: list[PromptRecord], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "mine.txt").write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"mine.txt is no record of this calibration"):
        run(bundle_copy, records, work=tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_bytes() == content
    with pytest.raises(InvalidInputError, match=r"/dev/full is no record"):
        run(bundle_copy, records, work=Path("/dev/full"))


def test_a_read_only_bundle_is_refused_before_anything_runs(
    bundle_copy: Path, records: list[PromptRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: path != bundle_copy)
    with pytest.raises(BundleError, match="is read-only; copy it"):
        run(bundle_copy, records, work=tmp_path / "work.jsonl")
    assert not (tmp_path / "work.jsonl").exists()


def test_too_few_rounds_are_refused(bundle_copy: Path, records: list[PromptRecord]) -> None:
    with pytest.raises(InvalidInputError, match=r"gave \d+ rounds at temperature 0, .* at least 100; give"):
        run(bundle_copy, records[:2], CalibrationOptions(max_new_tokens=20))
    assert not (bundle_copy / "calibration.json").exists()


SAMPLES = [RoundSample(0, 2, 1, 2, (0.1, 1 / 3), None), RoundSample(0, 0, 0, 1, (), None)]


def test_a_record_holds_what_was_added(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    with CalibrationRecord(path, "key") as record:
        record.add(3, 0.0, SAMPLES)
        record.add(3, 1.0, [])
        assert record.finished == {(3, 0.0): SAMPLES, (3, 1.0): []}
        with pytest.raises(InvalidInputError, match="another calibration is writing"), CalibrationRecord(path, "key"):
            pass
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole)):  # wherever a kill strikes
        path.write_bytes(whole[:cut])
        with CalibrationRecord(path, "key") as record:
            assert len(record.finished) == max(sum(end <= cut for end in ends) - 1, 0)
            assert path.read_bytes() == whole[: max([ends[0], *(end for end in ends if end <= cut)])]


def test_a_record_of_nothing_is_not_left_behind(bundle_copy: Path, records: list[PromptRecord]) -> None:
    with pytest.raises(InvalidInputError, match="line 9: token id 999"):
        run(bundle_copy, [*records, PromptRecord(9, "a", token_ids=(999,))])
    assert not list(bundle_copy.glob(WORK))


def test_a_damaged_line_ends_a_record(tmp_path: Path) -> None:
    path = tmp_path / "work.jsonl"
    with CalibrationRecord(path, "key") as record:
        record.add(0, 0.0, SAMPLES)
        kept = path.read_bytes()
        record.add(1, 0.0, SAMPLES)
    path.write_bytes(kept + b"\x00\x00\x00\n" + path.read_bytes()[len(kept) :])
    with CalibrationRecord(path, "key") as record:
        assert set(record.finished) == {(0, 0.0)}
    assert path.read_bytes() == kept


def test_a_full_disk_is_an_error_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "work.jsonl"
    with CalibrationRecord(path, "key") as record:
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(BundleError, match=r"cannot write .*work.jsonl: the disk is full"):
            record.add(0, 0.0, SAMPLES)
    with (
        pytest.raises(BundleError, match=r"cannot write .*: No such file"),
        CalibrationRecord(tmp_path / "gone" / "work", "key"),
    ):
        pass


def test_bundles_without_confidences_are_refused(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    facts = bundle.manifest.drafter
    for drafter, problem in (
        (facts.ngram(7), "drafts with ngram, which has no confidences"),
        (dataclasses.replace(facts, confidence=False), "has no confidence head"),
    ):
        manifest = dataclasses.replace(bundle.manifest, drafter=drafter)
        with pytest.raises(InvalidInputError, match=problem):
            check_calibratable(dataclasses.replace(bundle, manifest=manifest))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"temperatures": ()}, "the temperatures are \\[\\]"),
        ({"temperatures": (1.0, 1.0)}, "expected different ones"),
        ({"temperatures": (-1.0,)}, "temperature is -1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_out_of_range_are_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        CalibrationOptions(**given)
