"""Calibrating a bundle's confidences: run prompts, fit, write `calibration.json`. No torch here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Engine
from dspark_edge.engines.errors import BundleError, CapacityError, InvalidInputError
from dspark_edge.engines.replace_file import replace_file
from dspark_edge.runtime.calibration import CALIBRATION_NAME, Calibration, CalibrationData
from dspark_edge.runtime.generator import Generator, GeneratorOptions
from dspark_edge.runtime.prompts import PromptRecord, hash_prompts
from dspark_edge.runtime.sampling import SamplingParams
from dspark_edge.trainer.evaluation.calibration_fit import FEWEST_SAMPLES, fit_scaling
from dspark_edge.trainer.evaluation.calibration_record import CalibrationRecord
from dspark_edge.trainer.evaluation.collection import (
    Recorder,
    RoundSample,
    RoundTable,
    answer_turn,
    check_prompts,
    turn_prompt,
    turn_seed,
)

__all__ = ["CalibrationOptions", "calibrate", "check_calibratable"]


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """What a calibration is fitted on.

    Raises:
        InvalidInputError: a value is out of range.
    """

    temperatures: tuple[float, ...] = (0.0, 1.0)  # of sampling; a fit is made for each, on all prompts
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperatures or len(set(self.temperatures)) < len(self.temperatures):
            raise InvalidInputError(f"the temperatures are {list(self.temperatures)}, expected different ones")
        for temperature in self.temperatures:
            self.sampling(temperature, self.seed)

    def sampling(self, temperature: float, seed: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.max_new_tokens, temperature=temperature, seed=seed)


def check_calibratable(bundle: Bundle) -> None:
    """Refuse a bundle that has no confidences.

    Raises:
        InvalidInputError: its drafter is `ngram`, or has no confidence head.
    """
    drafter = bundle.manifest.drafter
    if drafter.kind == "ngram":
        raise InvalidInputError(f"the bundle {bundle.path} drafts with ngram, which has no confidences to calibrate")
    if not drafter.confidence:
        raise InvalidInputError(
            f"the drafter of the bundle {bundle.path} has no confidence head to calibrate; train one that has"
        )


def calibrate(
    engine: Engine,
    records: Sequence[PromptRecord],
    options: CalibrationOptions,
    *,
    work: Path | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Fit a bundle's calibration and write it.

    A run that was killed goes on where it stopped when it is started again with the same prompts, bundle and
    settings, and on the same machine ends with the same bits: every prompt starts from empty caches and a seed of its
    own.

    Args:
        engine: with the bundle; stays open.
        records: the prompts; none of them should be evaluated on later.
        options: see there.
        work: where to keep what is collected; None: a hidden file in the bundle. Deleted at the end.
        report: called with (answers done, answers in all).

    Raises:
        InvalidInputError: the bundle has no confidences, a prompt cannot be run, there are too few rounds, or the
            working file is another run's.
        BundleError: the bundle cannot be written to.
        EngineError: the backend failed.
    """
    bundle = engine.bundle
    check_calibratable(bundle)
    if not os.access(bundle.path, os.W_OK):  # said now, not when all prompts have been run
        raise BundleError(f"the bundle {bundle.path} is read-only; copy it to where you may write")
    key = _key(bundle, records, options)
    path = work or bundle.path / f".{CALIBRATION_NAME}.work-{key[:16]}"
    with CalibrationRecord(path, key) as record:
        _collect(engine, records, options, record, report or (lambda done, total: None))
        calibration = _fit(bundle, records, options, record)
        text = json.dumps(calibration.to_json(), indent=2) + "\n"
        replace_file(bundle.path / CALIBRATION_NAME, text.encode())
        record.remove()
    return calibration


def _key(bundle: Bundle, records: Sequence[PromptRecord], options: CalibrationOptions) -> str:
    """Names a run by everything that its result depends on."""
    said = {
        "prompts": hash_prompts(records),
        "lines": [record.line for record in records],  # seeds depend on them
        "bundle": {file.path: file.sha256 for file in bundle.manifest.files},
        "settings": [list(options.temperatures), options.max_new_tokens, options.seed],
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _collect(
    engine: Engine,
    records: Sequence[PromptRecord],
    options: CalibrationOptions,
    record: CalibrationRecord,
    report: Callable[[int, int], None],
) -> None:
    """Run all prompts at all temperatures that the record does not hold yet."""
    jobs = [(index, temperature) for index in range(len(records)) for temperature in options.temperatures]
    missing = [job for job in jobs if job not in record.finished]
    if not missing:
        return
    recorder = Recorder()
    # Not the bundle's own calibration, which may be damaged: this run replaces it.
    identity = Calibration.identity(engine.bundle.manifest.drafter.block_size)
    generator = Generator(engine, GeneratorOptions("static"), observer=recorder, calibration=identity)
    check_prompts(generator, records)
    report(len(jobs) - len(missing), len(jobs))
    for index, temperature in missing:
        record.add(index, temperature, _run(generator, recorder, records[index], options, temperature))
        report(len(record.finished), len(jobs))


def _run(
    generator: Generator, recorder: Recorder, prompt: PromptRecord, options: CalibrationOptions, temperature: float
) -> list[RoundSample]:
    """All rounds of a prompt, turn by turn."""
    generator.reset()
    rounds: list[RoundSample] = []
    answers: list[str] = []
    for turn in range(prompt.num_turns):
        params = options.sampling(temperature, turn_seed(options.seed, prompt, turn))
        try:
            generation, samples = answer_turn(generator, recorder, turn_prompt(prompt, turn, answers), params)
        except CapacityError:  # of a later turn: the first ones were checked
            break
        answers.append(generation.text)
        rounds += samples
    return rounds


def _fit(
    bundle: Bundle, records: Sequence[PromptRecord], options: CalibrationOptions, record: CalibrationRecord
) -> Calibration:
    fits = []
    for temperature in sorted(options.temperatures):
        # In the prompts' order, not in the order they were finished in: sums of floats depend on it.
        runs = [record.finished[index, temperature] for index in range(len(records))]
        samples = [sample for run in runs for sample in run]
        prompts = [index for index, run in enumerate(runs) for _ in run]
        table = RoundTable.of(samples, bundle.manifest.drafter.block_size, prompts)
        judged = int(table.judged(0).sum())
        if judged < FEWEST_SAMPLES:
            raise InvalidInputError(
                f"the prompts gave {judged} rounds at temperature {temperature:g}, calibration needs at least "
                f"{FEWEST_SAMPLES}; give more prompts or a larger --max-new-tokens"
            )
        fits.append(fit_scaling(table, temperature))
    data = CalibrationData(
        sha256=hash_prompts(records),
        prompts=len(records),
        prompt_digests=tuple(sorted({prompt.digest for prompt in records})),
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
    )
    return Calibration(tuple(fits), data)
