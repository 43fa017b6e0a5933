"""What an evaluation's answers come to: the numbers of a report, for one domain or for all.

Every name here is a key of the report's JSON; docs/evaluation.md says what each means.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy.typing as npt

from dspark_edge.runtime.generator import Generation
from dspark_edge.trainer.evaluation.collection import Judgement, RoundTable
from dspark_edge.trainer.evaluation.evaluate import TurnResult
from dspark_edge.trainer.evaluation.metrics import (
    Bin,
    Bools,
    Floats,
    auroc,
    brier_score,
    calibration_noise,
    corrected_calibration_error,
    expected_calibration_error,
    reliability_bins,
    running_product,
    sigmoid,
)

__all__ = ["DEPTHS", "ConfidenceMeasures", "DepthMeasures", "Measures", "SpeedMeasures", "measure"]

DEPTHS = (0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Where the buckets of anchor positions begin; the last has no end."""

Row = tuple[float | None, ...]  # [γ]; None where there are no samples


@dataclass(frozen=True, slots=True)
class ConfidenceMeasures:
    """How good the confidences are: conditional ones, where all drafts before had been accepted. Rows are [γ]."""

    confidence_samples: int
    ece: float | None
    auroc: float | None
    brier: float | None
    ece_by_position: Row
    ece_uncorrected_by_position: Row
    ece_noise_by_position: Row
    auroc_by_position: Row
    brier_by_position: Row
    survival_ece_by_position: Row  # of the running product, over all rounds that verified the position
    reliability: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class SpeedMeasures:
    """Tokens a second of decoding: behind the first token of each answer, prefill left out."""

    total: float | None  # all tokens by all seconds
    median: float | None  # over answers


@dataclass(frozen=True, slots=True)
class DepthMeasures:
    """Rounds whose anchor stood in [begin, end)."""

    begin: int
    end: int | None
    rounds: int
    accepted_length: float
    acceptance_rate: float | None
    first_position_acceptance: float | None


@dataclass(frozen=True, slots=True)
class Measures:
    """What a set of answers comes to. Rows are [γ]."""

    prompts: int
    turns: int
    rounds: int
    new_tokens: int
    draft_tokens: int  # that were verified, and not cut off behind the end of an answer
    accepted_length: float | None  # τ
    tokens_per_round: float | None
    acceptance_rate: float | None
    acceptance_by_position: Row
    conditional_acceptance_by_position: Row
    rounds_by_position: tuple[int, ...]
    samples_by_position: tuple[int, ...]
    acceptance_by_depth: tuple[DepthMeasures, ...]
    raw: ConfidenceMeasures | None  # None without a confidence head
    calibrated: ConfidenceMeasures | None  # None for a bundle that is not calibrated
    speed: SpeedMeasures
    plain_speed: SpeedMeasures | None
    speedup: float | None  # of the totals
    speedup_median: float | None  # over answers
    different_answers: int | None  # None where there are no plain answers

    def to_json(self) -> dict[str, Any]:
        """Flat: what is said of raw confidences under its own name, of calibrated ones with `_calibrated` behind."""
        data = asdict(self)
        raw, calibrated = data.pop("raw"), data.pop("calibrated")
        speed, plain_speed = data.pop("speed"), data.pop("plain_speed") or {"total": None, "median": None}
        names = [field.name for field in fields(ConfidenceMeasures)]
        data.update({name: raw[name] if raw else None for name in names})
        data.update({f"{name}_calibrated": calibrated[name] if calibrated else None for name in names[1:]})
        data["tokens_per_second"], data["tokens_per_second_median"] = speed["total"], speed["median"]
        data["plain_tokens_per_second"] = plain_speed["total"]
        data["plain_tokens_per_second_median"] = plain_speed["median"]
        return data


def measure(results: Sequence[TurnResult], block_size: int, calibrated: bool) -> Measures:
    """The measures of some answers.

    Args:
        results: the answers.
        block_size: γ.
        calibrated: whether the confidences that the runtime gave were calibrated.
    """
    samples = [(sample, result.record.line) for result in results for sample in result.samples]
    table = RoundTable.of([sample for sample, _ in samples], block_size, [line for _, line in samples])
    rounds = len(table)
    tokens = sum(len(result.static.token_ids) for result in results)
    drafts, accepted = int(table.verified.sum()), int(table.accepted.sum())
    plain = [result.plain for result in results if result.plain is not None]
    conditional = [table.conditional(index) for index in range(block_size)]
    speed = _speed([result.static for result in results])
    plain_speed = _speed(plain) if plain else None
    return Measures(
        prompts=len({result.record.line for result in results}),
        turns=len(results),
        rounds=rounds,
        new_tokens=tokens,
        draft_tokens=drafts,
        accepted_length=_mean(table.committed),
        tokens_per_round=(tokens - len(results)) / rounds if rounds else None,
        acceptance_rate=accepted / drafts if drafts else None,
        acceptance_by_position=tuple(_mean(table.survived(index)[table.judged(index)]) for index in range(block_size)),
        conditional_acceptance_by_position=tuple(
            _mean(table.survived(index)[chosen]) for index, chosen in enumerate(conditional)
        ),
        rounds_by_position=tuple(int(table.judged(index).sum()) for index in range(block_size)),
        samples_by_position=tuple(int(chosen.sum()) for chosen in conditional),
        acceptance_by_depth=_by_depth(table),
        raw=_confidence(table, sigmoid(table.logits)) if table.logits is not None else None,
        calibrated=_confidence(table, table.confidences) if calibrated and table.confidences is not None else None,
        speed=speed,
        plain_speed=plain_speed,
        speedup=_ratio(speed.total, plain_speed.total if plain_speed else None),
        speedup_median=_median(
            _ratio(_tokens_per_second(result.static), _tokens_per_second(result.plain)) for result in results
        ),
        different_answers=sum(result.difference is not None for result in results) if plain else None,
    )


def _confidence(table: RoundTable, confidences: Floats) -> ConfidenceMeasures:
    """The measures of confidences [N, γ]."""
    positions = range(confidences.shape[1])
    survival = running_product(confidences)

    own = [table.judgement(confidences, table.conditional(index), index) for index in positions]
    running = [table.judgement(survival, table.judged(index), index) for index in positions]
    pooled = Judgement.joined(own)

    def row(function: Callable[[Floats, Bools], float | None]) -> Row:
        return tuple(function(one.confidences, one.outcomes) for one in own)

    return ConfidenceMeasures(
        confidence_samples=len(pooled.confidences),
        ece=corrected_calibration_error(*pooled),
        auroc=auroc(pooled.confidences, pooled.outcomes),
        brier=brier_score(pooled.confidences, pooled.outcomes),
        ece_by_position=tuple(corrected_calibration_error(*one) for one in own),
        ece_uncorrected_by_position=row(expected_calibration_error),
        ece_noise_by_position=tuple(calibration_noise(*one) for one in own),
        auroc_by_position=row(auroc),
        brier_by_position=row(brier_score),
        survival_ece_by_position=tuple(corrected_calibration_error(*one) for one in running),
        reliability=tuple(reliability_bins(pooled.confidences, pooled.outcomes)),
    )


def _by_depth(table: RoundTable) -> tuple[DepthMeasures, ...]:
    """Acceptance in buckets of the anchor's position; buckets without rounds are left out."""
    buckets = []
    for begin, end in zip(DEPTHS, (*DEPTHS[1:], None), strict=True):
        inside = table.position >= begin
        if end is not None:
            inside &= table.position < end
        if not inside.any():
            continue
        drafts = int(table.verified[inside].sum())
        buckets.append(
            DepthMeasures(
                begin=begin,
                end=end,
                rounds=int(inside.sum()),
                accepted_length=float(table.committed[inside].mean()),
                acceptance_rate=int(table.accepted[inside].sum()) / drafts if drafts else None,
                first_position_acceptance=_mean(table.survived(0)[inside & table.judged(0)]),
            )
        )
    return tuple(buckets)


def _seconds(generation: Generation) -> float:
    """Seconds of decoding."""
    spent = generation.statistics
    return spent.draft_s + spent.verify_s + spent.host_s


def _tokens_per_second(generation: Generation | None) -> float | None:
    if generation is None or not _seconds(generation):
        return None
    return (len(generation.token_ids) - 1) / _seconds(generation)


def _speed(answers: Sequence[Generation]) -> SpeedMeasures:
    seconds = sum(map(_seconds, answers))
    tokens = sum(len(answer.token_ids) - 1 for answer in answers)
    return SpeedMeasures(tokens / seconds if seconds else None, _median(map(_tokens_per_second, answers)))


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _mean(values: npt.NDArray[Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
