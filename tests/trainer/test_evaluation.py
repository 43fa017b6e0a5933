"""Evaluation: what its numbers say of rounds that can be counted, and of the tiny bundle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.runtime import Generation, Generator, SamplingParams
from dspark_edge.runtime.calibration import Calibration, CalibrationData
from dspark_edge.runtime.prompts import PromptRecord, read_prompt_records
from dspark_edge.runtime.statistics import Tally
from dspark_edge.trainer.evaluation.collection import RoundSample
from dspark_edge.trainer.evaluation.evaluate import Evaluation, EvaluationOptions, TurnResult, evaluate
from dspark_edge.trainer.evaluation.measures import DepthMeasures, Measures, measure
from dspark_edge.trainer.evaluation.report import make_report

GAMMA = 3


def answer(tokens: int, seconds: float = 1.0) -> Generation:
    tally = Tally(1, 0, decode_s=seconds)
    return Generation((7,) * tokens, "", "length", (-0.5,) * tokens, tally.result(tokens))


def sample(position: int, accepted: int, verified: int = GAMMA, logits: tuple[float, ...] | None = None) -> RoundSample:
    return RoundSample(position, verified, accepted, accepted + 1, logits, None)


def result(samples: list[RoundSample], line: int = 1, domain: str = "a", seconds: float = 1.0) -> TurnResult:
    tokens = 1 + sum(one.committed for one in samples)
    return TurnResult(
        PromptRecord(line, domain, token_ids=(1,)), 0, answer(tokens, seconds), answer(tokens, 2.0), tuple(samples)
    )


def test_acceptance_is_counted_by_position() -> None:
    measures = measure([result([sample(10, 3), sample(14, 1), sample(70, 0), sample(71, 1, verified=1)])], GAMMA, False)
    assert (measures.rounds, measures.draft_tokens, measures.new_tokens) == (4, 10, 10)
    assert measures.accepted_length == pytest.approx((4 + 2 + 1 + 2) / 4)
    assert measures.acceptance_rate == pytest.approx(5 / 10)
    assert measures.acceptance_by_position == pytest.approx((3 / 4, 1 / 3, 1 / 3))
    assert measures.rounds_by_position == (4, 3, 3)
    assert measures.conditional_acceptance_by_position == pytest.approx((3 / 4, 1 / 2, 1))
    assert measures.samples_by_position == (4, 2, 1)
    assert measures.raw is None and measures.calibrated is None
    assert measures.acceptance_by_depth == (
        DepthMeasures(0, 64, 2, 3.0, pytest.approx(4 / 6), 1.0),
        DepthMeasures(64, 128, 2, 1.5, pytest.approx(1 / 4), 0.5),
    )


def test_tokens_behind_the_limit_count_for_the_drafter_but_not_for_the_user() -> None:
    one = dataclasses.replace(result([sample(1, 3), sample(5, 3)]), static=answer(7))
    measures = measure([one], GAMMA, False)
    assert measures.accepted_length == 4.0
    assert measures.tokens_per_round == 3.0


def test_speed_is_of_the_tokens_behind_the_first() -> None:
    results = [result([sample(1, 3)], seconds=1.0), result([sample(1, 1)], line=2, seconds=4.0), result([], line=3)]
    measures = measure(results, GAMMA, False)
    assert measures.speed.total == pytest.approx((4 + 2 + 0) / 6)
    assert measures.speed.median == pytest.approx(0.5)  # of 4, 0.5 and 0
    assert measures.plain_speed is not None and measures.plain_speed.total == pytest.approx(6 / 6)
    assert measures.speedup == pytest.approx(1.0)
    assert measures.speedup_median == pytest.approx((2 + 0.5) / 2)  # the empty answer has no ratio


def test_confidences_count_where_all_before_were_accepted() -> None:
    rounds = [sample(1, 1, logits=(0.0, 2.0, 9.0)), sample(1, 0, logits=(0.0, 9.0, 9.0))]
    raw = measure([result(rounds)], GAMMA, False).raw
    assert raw is not None
    assert raw.confidence_samples == 3
    assert raw.ece_uncorrected_by_position[0] == pytest.approx(0.0)
    assert raw.ece_uncorrected_by_position[1] == pytest.approx(0.8808, abs=1e-4)  # σ(2), and it was rejected
    assert raw.ece_uncorrected_by_position[2] is None and raw.auroc_by_position == (0.5, None, None)
    assert raw.brier_by_position[0] == pytest.approx(0.25)
    assert raw.survival_ece_by_position[2] is not None  # the running product, of all rounds


def test_no_answers_give_no_numbers() -> None:
    measures = measure([], GAMMA, False)
    assert measures.accepted_length is None and measures.acceptance_by_position == (None,) * GAMMA
    json.dumps(measures.to_json(), allow_nan=False)


def test_a_difference_is_where_two_answers_part() -> None:
    def parting(plain: tuple[int, ...], static: tuple[int, ...]) -> Any:
        answers = [
            Generation(ids, "", "stop", tuple(-float(token) for token in ids), answer(len(ids)).statistics)
            for ids in (plain, static)
        ]
        return TurnResult(PromptRecord(4, "a", turns=("x", "y")), 1, answers[1], answers[0], ()).difference

    assert parting((1, 2, 3), (1, 2, 3)) is None
    found = parting((1, 2, 3), (1, 5, 3))
    assert (found.line, found.turn, found.index, found.plain_token, found.static_token) == (4, 2, 1, 2, 5)
    assert (found.plain_log_prob, found.static_log_prob) == (-2.0, -5.0)
    shorter = parting((1, 2), (1, 2, 3))
    assert (shorter.index, shorter.plain_token, shorter.static_token) == (2, None, 3)


@pytest.fixture
def records(write_prompts: Callable[..., Path], reference_prompts: list[Any]) -> list[PromptRecord]:
    return read_prompt_records(write_prompts(reference_prompts))


def run(folder: Path, records: list[PromptRecord], **options: Any) -> Evaluation:
    with OnnxRuntimeEngine(Bundle.open(folder), threads=1) as engine:
        return evaluate(engine, records, EvaluationOptions(**{"max_new_tokens": 64, **options}))


def overall(evaluation: Evaluation) -> Measures:
    return measure(evaluation.results, evaluation.block_size, evaluation.calibration is not None)


def test_the_recorded_rounds_are_what_is_measured(bundle_dir: Path, records: list[PromptRecord], record: Any) -> None:
    evaluation = run(bundle_dir, records)
    for result, expected in zip(evaluation.results, record["samples"], strict=True):
        assert list(result.static.token_ids) == expected["output"][len(expected["prompt"]) :]
        accepted = [one.committed for one in result.samples]
        assert accepted == expected["acceptance_lengths"][: len(accepted)]
        assert [one.position for one in result.samples] == [one["start"] for one in expected["rounds"]][: len(accepted)]
        assert result.plain is not None and result.plain.token_ids == result.static.token_ids
    assert evaluation.differences == []
    measures = overall(evaluation)
    lengths = [length for result in evaluation.results for length in result.static.statistics.accepted_lengths]
    assert measures.accepted_length == pytest.approx(sum(lengths) / len(lengths))
    assert measures.different_answers == 0 and measures.speedup is not None


def test_the_first_prompt_leaves_nothing_to_the_others(bundle_dir: Path, records: list[PromptRecord]) -> None:
    together = run(bundle_dir, records, plain=False, temperature=1.0).results
    (alone,) = run(bundle_dir, records[3:4], plain=False, temperature=1.0).results
    assert alone.samples == together[3].samples and alone.static.token_ids == together[3].static.token_ids


def test_a_verify_length_bounds_what_is_judged(bundle_dir: Path, records: list[PromptRecord]) -> None:
    measures = overall(run(bundle_dir, records[:3], verify_length=2, plain=False))
    assert measures.rounds_by_position[2:] == (0,) * 5 and measures.samples_by_position[1] > 0
    assert measures.raw is not None and measures.raw.ece_by_position[2:] == (None,) * 5
    assert measures.plain_speed is None and measures.speedup is None and measures.different_answers is None
    with pytest.raises(InvalidInputError, match="verify_length is 9"):
        run(bundle_dir, records[:1], verify_length=9)


def test_turns_are_answered_with_the_models_own_words_between(text_bundle_dir: Path) -> None:
    turns = ("the cat", "the dog")
    evaluation = run(text_bundle_dir, [PromptRecord(1, "chat", turns=turns)], max_new_tokens=30)
    first, second = evaluation.results
    assert (first.turn, second.turn) == (0, 1)
    with Generator.open(text_bundle_dir, mode="plain", threads=1) as generator:
        prompt = f"u: the cat\na: {first.static.text}\nu: the dog\na: "
        expected = generator.generate(prompt, SamplingParams(max_new_tokens=30), raw=True)
    assert second.static.token_ids == expected.token_ids and evaluation.differences == []


def test_a_later_turn_that_does_not_fit_is_left_out(text_bundle_dir: Path) -> None:
    record = PromptRecord(1, "chat", turns=("x" * 150, "y" * 100, "z"))
    evaluation = run(text_bundle_dir, [record], max_new_tokens=40, plain=False)
    assert (len(evaluation.results), evaluation.skipped_turns) == (1, 2)


def test_a_report_warns_of_prompts_that_the_calibration_knows(bundle_copy: Path, records: list[PromptRecord]) -> None:
    identity = Calibration.identity(7)
    data = CalibrationData("a" * 64, 2, tuple(record.digest for record in records[:2]), 64, 0)
    calibration = dataclasses.replace(identity, data=data)
    (bundle_copy / "calibration.json").write_text(json.dumps(calibration.to_json()))
    evaluation = run(bundle_copy, records[1:5], plain=False)
    options = EvaluationOptions(max_new_tokens=64, plain=False)
    report = make_report(evaluation, Bundle.open(bundle_copy), records[1:5], options, {})
    assert report.repeated_prompts == 1
    assert "fitted on 1 of these 4 prompts" in report.warnings[0]
    # The identity changes nothing, and what the runtime gave is what is measured.
    assert report.overall.raw is not None and report.overall.calibrated is not None
    assert report.overall.calibrated.brier_by_position == pytest.approx(report.overall.raw.brier_by_position)


@pytest.mark.parametrize("given", [{"temperature": -1.0}, {"max_new_tokens": 0}, {"seed": -1}])
def test_options_out_of_range_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        EvaluationOptions(**given)
