"""How good confidences are, as pure functions of numpy arrays.

`confidences` are chances in [0, 1], `outcomes` whether what they speak of came true; both [N].

The expected calibration error (ECE) is read off bins of equal mass, not of equal width: confidences crowd near 0 and
1, and bins of equal width would hold a handful of samples each in between and be nearly all chance. There are 15
bins, the number most often used, but none of fewer than 200 samples.

Even a perfect confidence shows an error in a finite sample (about 0.3 · √(bins / N)), which for a few thousand
samples is as large as what calibration is to reach. `calibration_noise` says how large it is, and
`corrected_calibration_error` takes it out. Samples that come of one prompt are alike: drafts of an easy text are
accepted more often than confidences can know, of a hard one less often. They then tell less than as many independent
ones; `prompts`, [N] numbers, says which belong together, and None that all are independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "Bin",
    "Bools",
    "Floats",
    "Integers",
    "auroc",
    "brier_score",
    "calibration_noise",
    "corrected_calibration_error",
    "expected_calibration_error",
    "reliability_bins",
    "running_product",
    "sigmoid",
    "standard_error",
]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]

_MOST_BINS = 15
_FEWEST_IN_A_BIN = 200


@dataclass(frozen=True, slots=True)
class Bin:
    """A point of a reliability diagram."""

    count: int
    confidence: float  # mean
    outcome: float  # share that came true


@dataclass(frozen=True, slots=True)
class _Bins:
    """Sums over bins of equal mass, from the least confident on; all [bins]."""

    counts: Floats
    confidences: Floats
    outcomes: Floats
    variances: Floats  # of the sums of outcomes, were the confidences right


def _binned(confidences: Floats, outcomes: Bools, bins: int | None, prompts: Integers | None = None) -> _Bins:
    size = len(confidences)
    number = min(max(size // _FEWEST_IN_A_BIN, 1), _MOST_BINS) if bins is None else min(bins, size)
    order = np.argsort(confidences, kind="stable")
    confidences, found = confidences[order], outcomes[order].astype(np.float64)
    edges = np.arange(number + 1) * size // number

    def sums(values: Floats) -> Floats:
        totals: Floats = np.add.reduceat(values, edges[:-1])
        return totals

    counts = np.diff(edges).astype(np.float64)
    promised, came_true = sums(confidences), sums(found)
    if prompts is None:
        variances = sums(confidences * (1 - confidences))
    else:
        places = np.repeat(np.arange(number), np.diff(edges))
        surplus = found - confidences - ((came_true - promised) / counts)[places]  # without the bin's miscalibration
        variances = _variances_by_prompt(surplus, places, prompts[order], number)
    return _Bins(counts, promised, came_true, variances)


def _variances_by_prompt(surplus: Floats, places: Integers, prompts: Integers, bins: int) -> Floats:
    """The variance of each bin's sum, where only samples of different prompts are independent; [bins].

    The sum of the squares of the prompts' sums (Liang and Zeger, "Longitudinal data analysis using generalized linear
    models" (1986)), with the usual correction for few prompts. A bin of one prompt says nothing of others: 0.
    """
    pairs, which = np.unique(np.stack([places, prompts]), axis=1, return_inverse=True)
    squares = np.square(np.bincount(which.reshape(-1), weights=surplus))
    groups = np.bincount(pairs[0], minlength=bins)
    variances: Floats = np.bincount(pairs[0], weights=squares, minlength=bins) * groups / np.maximum(groups - 1, 1)
    return variances


def reliability_bins(confidences: Floats, outcomes: Bools, bins: int | None = None) -> list[Bin]:
    """The reliability diagram: mean confidence and share of true outcomes in bins of equal mass."""
    if not len(confidences):
        return []
    binned = _binned(confidences, outcomes, bins)
    rows = zip(binned.counts, binned.confidences, binned.outcomes, strict=True)
    return [Bin(int(count), float(confidence / count), float(outcome / count)) for count, confidence, outcome in rows]


def expected_calibration_error(confidences: Floats, outcomes: Bools, bins: int | None = None) -> float | None:
    """The mean distance, over samples, of their bin's mean confidence and share of true outcomes; None of nothing.

    Source: Naeini et al., "Obtaining Well Calibrated Probabilities Using Bayesian Binning" (2015).

    Args:
        bins: bins of equal mass; None: 15, or as many as have 200 samples.
    """
    if not len(confidences):
        return None
    binned = _binned(confidences, outcomes, bins)
    return float(np.abs(binned.confidences - binned.outcomes).sum() / len(confidences))


def calibration_noise(
    confidences: Floats, outcomes: Bools, prompts: Integers | None = None, bins: int | None = None
) -> float | None:
    """The ECE that these confidences would show in a sample of this size if they were exactly right.

    A bin's mean outcome is then normal around its mean confidence, and the mean of its distance from it is
    √(2/π) standard deviations.
    """
    if not len(confidences):
        return None
    variances = _binned(confidences, outcomes, bins, prompts).variances
    return float(np.sqrt(variances * 2 / math.pi).sum() / len(confidences))


def corrected_calibration_error(
    confidences: Floats, outcomes: Bools, prompts: Integers | None = None, bins: int | None = None
) -> float | None:
    """The ECE without what chance adds: √(ECE² − noise²), at least 0.

    Squares, because chance adds to a miscalibration in squares: where the miscalibration is large, noise adds next to
    nothing to the ECE, and next to nothing is taken off. (For squared errors this is exact: Kumar, Liang and Ma,
    "Verified Uncertainty Calibration" (2019), section 5. For distances it is right where there is no miscalibration
    and where there is much, and at most a fifth low between.)
    """
    error = expected_calibration_error(confidences, outcomes, bins)
    noise = calibration_noise(confidences, outcomes, prompts, bins)
    return None if error is None or noise is None else math.sqrt(max(error * error - noise * noise, 0.0))


def standard_error(confidences: Floats, outcomes: Bools, bins: int | None = None) -> float:
    """By how much the ECE of exactly right confidences varies from sample to sample (one standard deviation)."""
    variances = _binned(confidences, outcomes, bins).variances
    return float(np.sqrt((1 - 2 / math.pi) * variances.sum()) / len(confidences))


def auroc(confidences: Floats, outcomes: Bools) -> float | None:
    """The chance that a true outcome had more confidence than a false one, ties counted half; None without both."""
    positives = int(outcomes.sum())
    negatives = len(outcomes) - positives
    if not positives or not negatives:
        return None
    _, group, counts = np.unique(confidences, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # the mean rank, from 1 on, of each group of equal confidences
    won = ranks[group.reshape(-1)][outcomes].sum() - positives * (positives + 1) / 2
    return float(won / (positives * negatives))


def brier_score(confidences: Floats, outcomes: Bools) -> float | None:
    """The mean squared distance of confidence and outcome; None of nothing."""
    if not len(confidences):
        return None
    return float(np.square(confidences - outcomes).mean())


def sigmoid(logits: Floats) -> Floats:
    """Chances of logits; overflows nowhere."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * logits)))


def running_product(confidences: Floats) -> Floats:
    """Survival of conditional confidences [N, γ]: the chance that a position and all before it come true."""
    product: Floats = np.cumprod(confidences, axis=1, dtype=np.float64)
    return product
