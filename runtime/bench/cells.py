"""From runs to cells: medians, ratios between contenders of one run, and what is worst. Pure functions on numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, variance

from dspark_edge.runtime.bench.contenders import Run, whole

__all__ = ["Cell", "Place", "cells_of", "worst_first"]

Answers = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Place:
    """What all modes of a group of runs have in common."""

    bundle: str
    precision: str
    domain: str
    temperature: float
    concurrency: int


@dataclass(frozen=True, slots=True)
class Cell:
    """A measured combination."""

    mode: str
    concurrency: int
    domain: str
    temperature: float
    precision: str
    bundle: str
    tokens_per_second: float  # median over the repeats; of all requests together, behind their first tokens
    spread: float  # (largest − smallest) / median
    accepted_length: float  # τ
    parked_share: float  # of the time of drafts and verifications
    requests: int  # a repeat
    tokens: int  # behind first ones, of a repeat; median
    mean_concurrency: float  # requests a round, over the repeats: fewer at the beginning, while prompts are read
    schedule_us: float  # microseconds of scheduling a round
    prediction_error: float | None  # median of |predicted / observed − 1| of rounds; None: nothing was predicted
    speedup: float | None  # median over the repeats of the ratio to mode plain; None without it
    speedup_error: float | None  # its standard error, by what equal parts differ from repeat to repeat; None: unknown
    of_best: float | None  # the same to the fastest of all other modes
    same_answers: float | None  # share of the answers that are plain decoding's; None at temperatures above 0


def cells_of(place: Place, parts: Mapping[str, Sequence[Sequence[Run]]], reference: Answers | None) -> list[Cell]:
    """The cells of one group of runs.

    Args:
        place: of the group.
        parts: mode → of each repeat the runs of its parts, which took turns with those of the other modes.
        reference: what plain decoding answers; None at temperatures above 0, or where it did not run.
    """
    runs = {mode: [whole(of_repeat) for of_repeat in repeats] for mode, repeats in parts.items()}
    medians = {mode: median(run.tokens_per_second for run in of_mode) for mode, of_mode in runs.items()}
    found = []
    for mode, of_mode in runs.items():
        others = [other for other in runs if other != mode]
        best = max(others, key=lambda other: medians[other], default=None)
        speeds = [run.tokens_per_second for run in of_mode]
        errors = [run.prediction_error for run in of_mode if run.prediction_error is not None]
        rounds, steps = sum(run.rounds for run in of_mode), sum(run.steps for run in of_mode)
        observed = sum(run.observed_s for run in of_mode)
        found.append(
            Cell(
                mode=mode,
                concurrency=place.concurrency,
                domain=place.domain,
                temperature=place.temperature,
                precision=place.precision,
                bundle=place.bundle,
                tokens_per_second=medians[mode],
                spread=(max(speeds) - min(speeds)) / medians[mode] if medians[mode] else 0.0,
                accepted_length=_ratio(sum(run.committed for run in of_mode), rounds),
                parked_share=_ratio(sum(run.parked_s for run in of_mode), observed),
                requests=len(of_mode[0].answers),
                tokens=round(median(run.tokens for run in of_mode)),
                mean_concurrency=_ratio(rounds, steps),
                schedule_us=1e6 * _ratio(sum(run.schedule_s for run in of_mode), steps),
                prediction_error=median(errors) if errors else None,
                speedup=_paired(of_mode, runs.get("plain")) if mode != "plain" else None,
                speedup_error=_error(parts[mode], parts.get("plain")) if mode != "plain" else None,
                of_best=_paired(of_mode, runs[best]) if best is not None else None,
                same_answers=_same(of_mode, reference),
            )
        )
    return found


def worst_first(cells: Sequence[Cell]) -> list[Cell]:
    """Scheduled cells by their ratio to the best other mode, the worst first; then all others, the slowest first."""

    def key(cell: Cell) -> tuple[bool, float]:
        ratio = cell.of_best if cell.mode == "scheduled" else cell.speedup
        return cell.mode != "scheduled", float("inf") if ratio is None else ratio

    return sorted(cells, key=key)


def _paired(runs: Sequence[Run], others: Sequence[Run] | None) -> float | None:
    """Median over the repeats of the ratio of speeds."""
    if others is None:
        return None
    pairs = zip(runs, others, strict=True)
    ratios = [_ratio(run.tokens_per_second, other.tokens_per_second) for run, other in pairs]
    return median(ratios)


def _error(repeats: Sequence[Sequence[Run]], others: Sequence[Sequence[Run]] | None) -> float | None:
    """Standard error of the ratio of speeds.

    A part's ratio differs from repeat to repeat by the machine's noise (and, above temperature 0, by what is drawn);
    that parts differ from each other, as prompts do, is no error. So: the variance of the logarithm within parts, over
    how many ratios there are.
    """
    if others is None or len(repeats) < 2:
        return None
    ratios = [
        [_ratio(part.tokens_per_second, other.tokens_per_second) for part, other in zip(*of_repeat, strict=True)]
        for of_repeat in zip(repeats, others, strict=True)
    ]
    by_part = [[math.log(ratio) for ratio in of_part if ratio > 0] for of_part in zip(*ratios, strict=True)]
    by_part = [of_part for of_part in by_part if len(of_part) > 1]
    if not by_part:
        return None
    within = sum(variance(of_part) * (len(of_part) - 1) for of_part in by_part)
    freedom, count = sum(len(of_part) - 1 for of_part in by_part), sum(map(len, by_part))
    typical = math.exp(sum(map(sum, by_part)) / count)
    return typical * math.sqrt(within / freedom / count)


def _same(runs: Sequence[Run], reference: Answers | None) -> float | None:
    if reference is None:
        return None
    same = [answer == wanted for run in runs for answer, wanted in zip(run.answers, reference, strict=True)]
    return _ratio(sum(same), len(same))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
