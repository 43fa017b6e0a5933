"""Sequential Temperature Scaling: confidences that are as often right as they say. Pure functions of arrays.

Source: the DSpark paper's Sequential Temperature Scaling. Positions are fitted left to right. At each one a grid of
temperatures is searched for the least calibration error (ECE) of the running product of the confidences, the fits of
the positions before it applied, and the neighbourhood of the best once more.

Two things are ours, both because a sample is finite:

- The ECE of a product is flat where few drafts survive, and where its least value lies a matter of chance. Of the
  temperatures that chance cannot tell from the best (their ECE lies within two standard errors of the least) the one
  is taken that makes the position's own outcomes likeliest. On synthetic rounds this halves the error that is left.
- A temperature moves all confidences towards one half or away from it, never across, and the same way on both sides.
  The head is trained on chances of sampling, while greedy decoding accepts what is likeliest: then no temperature is
  right. So a bias, and then a temperature of its own for logits below zero, are fitted by maximum likelihood (Platt
  1999; beta calibration, Kull, Silva Filho and Flach 2017), and kept where Akaike's information criterion expects them
  to do better on other prompts. The scaled logit still rises with the raw one, so a position's confidences keep their
  order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dspark_edge.runtime.calibration import Fit, Scaling
from dspark_edge.trainer.evaluation.collection import RoundTable
from dspark_edge.trainer.evaluation.metrics import (
    Bools,
    Floats,
    corrected_calibration_error,
    expected_calibration_error,
    running_product,
    sigmoid,
    standard_error,
)

__all__ = ["FEWEST_SAMPLES", "fit_scaling", "scaled"]

FEWEST_SAMPLES = 100
"""Samples below which a position takes over the scaling of the one before it."""

_LOWEST, _HIGHEST = 0.2, 10.0  # temperatures; below, logits that differ would both be as good as certain
_GRID = np.geomspace(_LOWEST, _HIGHEST, 49)  # steps of 8 %
_REFINED_STEPS = 17  # within a step of the grid to either side: steps of 1 %
_LARGEST_BIAS = 8.0
_NEWTON_STEPS = 100
_DIGITS = 4  # of what is stored: far finer than any sample can tell


@dataclass(frozen=True, slots=True)
class _Scale:
    """The scaling of one position."""

    temperature: float
    temperature_below: float
    bias: float

    def __call__(self, logits: Floats) -> Floats:
        """Scaled logits."""
        above, below = np.logaddexp(0.0, logits), np.logaddexp(0.0, -logits)
        return np.asarray(above / self.temperature - below / self.temperature_below + self.bias)


@dataclass(frozen=True, slots=True)
class _Position:
    """What a position is fitted on: the rounds that judged it. All [N]."""

    survival: Floats  # running product of the positions before
    logits: Floats  # of this position
    survived: Bools  # whether it and all before it were accepted
    conditional: Bools  # whether all before it were

    def products(self, scale: _Scale) -> Floats:
        """The running product, this position included."""
        return self.survival * sigmoid(scale(self.logits))

    @property
    def own_logits(self) -> Floats:
        """Where all before it were accepted."""
        return self.logits[self.conditional]

    @property
    def targets(self) -> Floats:
        """The outcomes to `own_logits`, a little short of certain: where all were accepted, another one might not be.

        Source: Platt, "Probabilistic Outputs for Support Vector Machines" (1999).
        """
        accepted = self.survived[self.conditional]
        positives = int(accepted.sum())
        return np.where(accepted, (positives + 1) / (positives + 2), 1 / (len(accepted) - positives + 2))

    def loss(self, scale: _Scale) -> float:
        """The negative log-likelihood of the outcomes."""
        scaled_logits = scale(self.own_logits)
        return float((np.logaddexp(0.0, scaled_logits) - self.targets * scaled_logits).sum())


def fit_scaling(table: RoundTable, sampling_temperature: float) -> Fit:
    """Fit a scaling to rounds that were sampled at one temperature, and measure it on them.

    Args:
        table: rounds with confidence logits.
        sampling_temperature: what they were sampled at.

    Raises:
        ValueError: the table has no confidence logits.
    """
    if table.logits is None:
        raise ValueError("the rounds have no confidence logits")
    block_size = table.logits.shape[1]
    survival = np.ones(len(table))
    scale = _Scale(1.0, 1.0, 0.0)  # where there are too few samples from the first position on
    scales = []
    for index in range(block_size):
        judged = table.judged(index)
        position = _Position(
            survival[judged],
            table.logits[judged, index],
            table.survived(index)[judged],
            table.conditional(index)[judged],
        )
        if position.conditional.sum() >= FEWEST_SAMPLES:
            scale = _fit_position(position)
        scales.append(scale)
        survival[judged] = position.products(scale)
    scaling = Scaling(
        tuple(scale.temperature for scale in scales),
        tuple(scale.temperature_below for scale in scales),
        tuple(scale.bias for scale in scales),
    )
    raw, fitted = sigmoid(table.logits), scaled(table.logits, scaling)
    return Fit(
        sampling_temperature=sampling_temperature,
        scaling=scaling,
        samples=tuple(int(table.conditional(index).sum()) for index in range(block_size)),
        ece_before=_errors(table, raw, table.conditional),
        ece_after=_errors(table, fitted, table.conditional),
        survival_ece_before=_errors(table, running_product(raw), table.judged),
        survival_ece_after=_errors(table, running_product(fitted), table.judged),
    )


def scaled(logits: Floats, scaling: Scaling) -> Floats:
    """Calibrated confidences of logits [N, γ]: `Scaling.confidences` for many rounds at once."""
    rows = (scaling.temperatures, scaling.temperatures_below, scaling.biases)
    columns = [sigmoid(_Scale(*row)(logits[:, index])) for index, row in enumerate(zip(*rows, strict=True))]
    return np.stack(columns, axis=1)


def _errors(table: RoundTable, chances: Floats, rows: Callable[[int], Bools]) -> tuple[float | None, ...]:
    """The corrected ECE of each position's chances [N, γ] in the rounds that count for it."""
    errors = []
    for index in range(chances.shape[1]):
        error = corrected_calibration_error(*table.judgement(chances, rows(index), index))
        errors.append(None if error is None else round(error, _DIGITS))
    return tuple(errors)


def _fit_position(position: _Position) -> _Scale:
    """The scaling of one position, of as many parameters as its outcomes are worth."""
    logits = position.own_logits
    above, below, ones = np.logaddexp(0.0, logits), -np.logaddexp(0.0, -logits), np.ones_like(logits)
    _, slope, bias = _fit_logistic(np.stack([0 * ones, logits, ones], axis=1), position.targets)
    biased = _rounded(slope, slope, bias)
    beta = _rounded(*_fit_logistic(np.stack([above, below, ones], axis=1), position.targets))
    candidates = [(_search_temperature(position), 1), (biased, 2), (beta, 3)]  # with their numbers of parameters
    return min(candidates, key=lambda one: position.loss(one[0]) + one[1])[0]


def _search_temperature(position: _Position) -> _Scale:
    """The likeliest of the temperatures whose product's ECE is within two standard errors of the least."""

    def best(candidates: Floats) -> float:
        scales = [_Scale(temperature, temperature, 0.0) for temperature in candidates.tolist()]
        products = [position.products(scale) for scale in scales]
        errors = [expected_calibration_error(product, position.survived) or 0.0 for product in products]
        least = int(np.argmin(errors))
        bound = errors[least] + 2 * standard_error(products[least], position.survived)
        losses = [
            position.loss(scale) if error <= bound else np.inf for scale, error in zip(scales, errors, strict=True)
        ]
        return scales[int(np.argmin(losses))].temperature

    coarse, step = best(_GRID), _GRID[1] / _GRID[0]
    fine = best(np.geomspace(max(coarse / step, _LOWEST), min(coarse * step, _HIGHEST), _REFINED_STEPS))
    return _rounded(1 / fine, 1 / fine, 0.0)


def _rounded(slope: float, slope_below: float, bias: float) -> _Scale:
    return _Scale(round(1 / slope, _DIGITS), round(1 / slope_below, _DIGITS), round(bias, _DIGITS))


def _fit_logistic(features: Floats, targets: Floats) -> tuple[float, float, float]:
    """Logistic regression by maximum likelihood: two slopes, kept to those of allowed temperatures, and a bias.

    Projected Newton steps; the loss is convex, and three numbers are sought.

    Args:
        features: [N, 3], for the two slopes and the bias (1); a column of zeros leaves its slope as it is.
        targets: [N], in [0, 1].
    """
    lowest = np.array([1 / _HIGHEST, 1 / _HIGHEST, -_LARGEST_BIAS])
    highest = np.array([1 / _LOWEST, 1 / _LOWEST, _LARGEST_BIAS])

    def loss(weights: Floats) -> float:
        logits = features @ weights
        return float((np.logaddexp(0.0, logits) - targets * logits).sum())

    weights = np.array([1.0, 1.0, 0.0])
    current = loss(weights)
    for _ in range(_NEWTON_STEPS):
        chances = sigmoid(features @ weights)
        gradient = features.T @ (chances - targets)
        # What stands at its bound and would go beyond it stays.
        free = ~(((weights <= lowest) & (gradient > 0)) | ((weights >= highest) & (gradient < 0)))
        curvature = (features * (chances * (1 - chances))[:, None]).T @ features + 1e-9 * np.eye(3)
        step = np.zeros(3)
        step[free] = np.linalg.solve(curvature[np.ix_(free, free)], gradient[free])
        scale = 1.0
        while (improved := loss(np.clip(weights - scale * step, lowest, highest))) > current and scale > 1e-6:
            scale /= 2
        if improved > current - 1e-9:
            break
        weights, current = np.clip(weights - scale * step, lowest, highest), improved
    return float(weights[0]), float(weights[1]), float(weights[2])
