"""Sequential Temperature Scaling on rounds whose miscalibration is known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dspark_edge.runtime.calibration import Scaling
from dspark_edge.trainer.evaluation.calibration_fit import FEWEST_SAMPLES, fit_scaling, scaled
from dspark_edge.trainer.evaluation.collection import RoundTable
from dspark_edge.trainer.evaluation.metrics import Floats, auroc, corrected_calibration_error

GAMMA = 4


def rounds(
    size: int, temperatures: tuple[float, ...], biases: tuple[float, ...] = (0.0,) * GAMMA, seed: int = 0
) -> RoundTable:
    """Rounds in which a draft is accepted with the chance σ(logit / temperature + bias)."""
    random = np.random.default_rng(seed)
    logits = random.normal(0.8, 1.5, (size, GAMMA))
    return judged(logits, scaled(logits, Scaling(temperatures, temperatures, biases)), random)


def judged(logits: Floats, chances: Floats, random: np.random.Generator) -> RoundTable:
    accepted = np.cumprod(random.random(chances.shape) < chances, axis=1).sum(axis=1)
    size = len(logits)
    return RoundTable(np.zeros(size, np.int64), np.full(size, GAMMA), accepted, accepted + 1, logits, None)


def errors(table: RoundTable, confidences: Floats) -> list[float]:
    """The calibration error of each position's conditional confidences."""
    found = []
    for index in range(GAMMA):
        rows = table.conditional(index)
        found.append(corrected_calibration_error(confidences[rows, index], table.survived(index)[rows]) or 0.0)
    return found


def test_known_temperatures_are_recovered() -> None:
    temperatures = (0.5, 0.8, 1.5, 2.5)
    fit = fit_scaling(rounds(10_000, temperatures), 0.0)
    assert fit.scaling.temperatures == pytest.approx(temperatures, rel=0.12)
    for ece in (*fit.ece_after, *fit.survival_ece_after):
        assert ece is not None and ece <= 0.015
    assert fit.ece_before[0] is not None and fit.ece_before[0] > 0.08
    assert fit.samples[0] == 10_000 and min(fit.samples) > 500


def test_right_confidences_stay_as_they_are() -> None:
    fit = fit_scaling(rounds(10_000, (1.0,) * GAMMA), 0.0)
    assert fit.scaling.temperatures == pytest.approx((1.0,) * GAMMA, abs=0.1)
    assert fit.scaling.biases == pytest.approx((0.0,) * GAMMA, abs=0.1)


@pytest.mark.parametrize("seed", [1, 2])
def test_other_rounds_are_calibrated_too(seed: int) -> None:
    table, other = (rounds(8_000, (0.4, 0.6, 1.7, 2.0), seed=one) for one in (seed, seed + 100))
    assert other.logits is not None
    raw = errors(other, scaled(other.logits, Scaling.identity(GAMMA)))
    fitted = errors(other, scaled(other.logits, fit_scaling(table, 0.0).scaling))
    assert max(raw) > 0.06 and max(fitted) <= 0.02


def test_a_bias_is_fitted_where_no_temperature_is_right() -> None:
    # Accepted more often than said on both sides of one half.
    table, other = (rounds(8_000, (1.0,) * GAMMA, (0.8,) * GAMMA, seed=one) for one in (1, 2))
    fit = fit_scaling(table, 0.0)
    assert min(fit.scaling.biases) > 0.3
    assert other.logits is not None
    assert max(errors(other, scaled(other.logits, fit.scaling))) <= 0.02


def test_logits_below_zero_get_a_temperature_of_their_own() -> None:
    def bent(seed: int) -> RoundTable:
        random = np.random.default_rng(seed)
        logits = random.normal(0.5, 1.5, (8_000, GAMMA))
        scaling = Scaling((0.6,) * GAMMA, (5.0,) * GAMMA, (-0.8,) * GAMMA)
        return judged(logits, scaled(logits, scaling), random)

    fit, other = fit_scaling(bent(1), 0.0), bent(2)
    for above, below in zip(fit.scaling.temperatures, fit.scaling.temperatures_below, strict=True):
        assert above < 1 < below
    assert other.logits is not None
    assert max(errors(other, scaled(other.logits, fit.scaling))) <= 0.02


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_drafts_that_are_always_or_never_accepted_fit_too(chance: float) -> None:
    logits = np.random.default_rng(0).normal(0.5, 1, (600, GAMMA))
    fit = fit_scaling(judged(logits, np.full(logits.shape, chance), np.random.default_rng(1)), 0.0)
    for values in (fit.scaling.temperatures, fit.scaling.temperatures_below, fit.scaling.biases):
        assert np.isfinite(values).all()
    assert min(fit.scaling.temperatures) > 0
    confidences = scaled(logits, fit.scaling)[:, 0]
    assert abs(confidences - chance).max() < 0.1 and confidences.min() > 0 and confidences.max() < 1


def test_the_order_of_confidences_stays() -> None:
    table = rounds(3000, (0.3, 3.0, 1.0, 2.0), (2.0, -1.0, 0.5, 0.0))
    fit = fit_scaling(table, 0.0)
    assert table.logits is not None
    calibrated = scaled(table.logits, fit.scaling)
    for index in range(GAMMA):
        rows = table.conditional(index)
        outcomes = table.survived(index)[rows]
        assert auroc(calibrated[rows, index], outcomes) == auroc(table.logits[rows, index], outcomes)


def test_a_position_with_few_samples_takes_over_the_one_before() -> None:
    table = rounds(4000, (2.0,) * GAMMA, (0.0, -4.0, 0.0, 0.0))
    fit = fit_scaling(table, 0.0)
    assert fit.samples[1] >= FEWEST_SAMPLES > fit.samples[2]
    scales = list(zip(fit.scaling.temperatures, fit.scaling.temperatures_below, fit.scaling.biases, strict=True))
    assert scales[0] != scales[1] == scales[2] == scales[3]


def test_positions_that_were_not_verified_count_for_nothing() -> None:
    table = rounds(3000, (1.5,) * GAMMA)
    assert table.logits is not None
    shorter = RoundTable(
        table.position,
        np.full(3000, 2),
        np.minimum(table.accepted, 2),
        table.committed,
        np.where(np.arange(GAMMA) < 2, table.logits, 0.0),
        None,
    )
    whole, part = fit_scaling(table, 0.0), fit_scaling(shorter, 0.0)
    assert part.scaling.temperatures[:2] == whole.scaling.temperatures[:2]
    assert part.samples == (*whole.samples[:2], 0, 0)
    assert part.ece_after[2:] == (None, None)


def test_one_round_at_a_time_is_scaled_as_many() -> None:
    logits = np.random.default_rng(0).normal(0, 4, (50, GAMMA))
    scaling = Scaling((0.5, 1.0, 2.0, 9.0), (0.5, 3.0, 0.2, 9.0), (0.0, -1.0, 2.0, 0.5))
    together = scaled(logits, scaling)
    for row, expected in zip(logits.tolist(), together.tolist(), strict=True):
        confidences = scaling.confidences(row)
        assert confidences == pytest.approx(expected, abs=1e-12)
        assert scaling.survival(row) == pytest.approx(list(itertools.accumulate(expected, lambda a, b: a * b)))


def test_rounds_without_confidences_are_refused() -> None:
    nothing = np.zeros(3, np.int64)
    with pytest.raises(ValueError, match="no confidence logits"):
        fit_scaling(RoundTable(nothing, nothing, nothing, nothing, None, None), 0.0)
