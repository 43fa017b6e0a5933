"""The measures of confidences, on samples that can be counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dspark_edge.trainer.evaluation.metrics import (
    Bin,
    Bools,
    Floats,
    Integers,
    auroc,
    brier_score,
    calibration_noise,
    corrected_calibration_error,
    expected_calibration_error,
    reliability_bins,
    running_product,
    sigmoid,
    standard_error,
)

FOUR = np.array([0.2, 0.4, 0.6, 0.8])
UPPER = np.array([False, False, True, True])
NOTHING = np.zeros(0), np.zeros(0, bool)


def drawn(chances: Floats, seed: int = 0) -> Bools:
    drawn: Bools = np.random.default_rng(seed).random(len(chances)) < chances
    return drawn


def test_the_calibration_error_is_read_off_bins_of_equal_mass() -> None:
    assert expected_calibration_error(FOUR, UPPER, bins=1) == 0.0
    assert expected_calibration_error(FOUR, UPPER, bins=2) == pytest.approx(0.3)
    assert expected_calibration_error(FOUR, UPPER, bins=4) == pytest.approx((0.2 + 0.4 + 0.4 + 0.2) / 4)
    assert expected_calibration_error(FOUR, UPPER, bins=9) == pytest.approx(0.3)  # no bin is empty
    order = [2, 0, 3, 1]
    assert expected_calibration_error(FOUR[order], UPPER[order], bins=2) == pytest.approx(0.3)
    assert reliability_bins(FOUR, UPPER, bins=2) == [
        Bin(2, pytest.approx(0.3), 0.0),
        Bin(2, pytest.approx(0.7), 1.0),
    ]


def test_bins_are_15_or_as_many_as_have_200_samples() -> None:
    for size, bins in ((1, 1), (399, 1), (400, 2), (1100, 5), (3000, 15), (100_000, 15)):
        confidences = np.linspace(0, 1, size)
        found = reliability_bins(confidences, confidences > 0.5)
        assert len(found) == bins and sum(one.count for one in found) == size


def test_chance_alone_shows_an_error() -> None:
    expected = math.sqrt(2 / math.pi * (0.16 + 0.24 + 0.24 + 0.16)) / 4
    assert calibration_noise(FOUR, UPPER, bins=1) == pytest.approx(expected)
    chances = np.random.default_rng(999).random(3000)
    errors = [expected_calibration_error(chances, drawn(chances, seed)) or 0.0 for seed in range(200)]
    assert np.mean(errors) == pytest.approx(calibration_noise(chances, drawn(chances)), rel=0.05)
    assert np.std(errors) == pytest.approx(standard_error(chances, drawn(chances)), rel=0.15)


def test_the_corrected_error_is_the_miscalibration_alone() -> None:
    chances = np.random.default_rng(999).uniform(0.2, 0.8, 3000)
    for shift in (0.0, 0.05, 0.2):
        corrected = [corrected_calibration_error(chances + shift, drawn(chances, seed)) or 0.0 for seed in range(100)]
        assert np.mean(corrected) == pytest.approx(shift, abs=0.012)
    assert (expected_calibration_error(chances, drawn(chances)) or 0.0) > 0.015


def alike(chances: Floats, size: int, seed: int = 0) -> tuple[Bools, Integers]:
    """Outcomes of prompts with `size` samples each, which a prompt makes likelier or less likely together."""
    random = np.random.default_rng(seed)
    prompts = np.arange(len(chances)) // size
    likelier = random.choice([-0.15, 0.15], prompts[-1] + 1)[prompts]
    outcomes: Bools = random.random(len(chances)) < chances + likelier
    return outcomes, prompts


def test_samples_of_one_prompt_tell_less() -> None:
    chances = np.random.default_rng(999).uniform(0.2, 0.8, 3000)
    drawings = [alike(chances, 50, seed) for seed in range(200)]
    errors = [expected_calibration_error(chances, outcomes) or 0.0 for outcomes, _ in drawings]
    independent = [calibration_noise(chances, outcomes) or 0.0 for outcomes, _ in drawings]
    by_prompt = [calibration_noise(chances, outcomes, prompts) or 0.0 for outcomes, prompts in drawings]
    assert np.mean(independent) < 0.93 * np.mean(errors)
    assert np.mean(by_prompt) == pytest.approx(np.mean(errors), rel=0.05)
    for shift in (0.05, 0.2):  # what is wrong everywhere is not taken for chance
        corrected = [corrected_calibration_error(chances + shift, *drawing) or 0.0 for drawing in drawings[:100]]
        assert np.mean(corrected) == pytest.approx(shift, abs=0.012)


def test_the_noise_of_prompts_by_hand() -> None:
    one_bin = np.full(4, 0.5)
    outcomes = np.array([True, True, False, False])
    # Each prompt's sum lies 1 from what is promised: a variance of 1 + 1, twice that for two prompts.
    assert calibration_noise(one_bin, outcomes, np.array([7, 7, 3, 3]), 1) == pytest.approx(
        math.sqrt(4 * 2 / math.pi) / 4
    )
    assert calibration_noise(one_bin, outcomes, np.array([7, 3, 7, 3]), 1) == 0.0  # the prompts agree
    each = calibration_noise(one_bin, outcomes, np.arange(4), 1)
    assert each == pytest.approx(math.sqrt(4 / 3 * 2 / math.pi) / 4)  # independent: 1, but for the correction
    assert calibration_noise(one_bin, outcomes, np.zeros(4, np.int64), 1) == 0.0  # nothing to tell it by
    assert corrected_calibration_error(one_bin + 0.1, outcomes, np.array([7, 3, 7, 3]), 1) == pytest.approx(0.1)


def test_auroc_counts_ties_half() -> None:
    assert auroc(np.array([0.1, 0.4, 0.4, 0.8]), UPPER) == pytest.approx(3.5 / 4)
    assert auroc(FOUR, UPPER) == 1.0
    assert auroc(FOUR, ~UPPER) == 0.0
    assert auroc(np.full(4, 0.5), UPPER) == 0.5
    assert auroc(FOUR, np.ones(4, bool)) is None
    scores, outcomes = np.round(np.random.default_rng(0).random(60), 1), drawn(np.full(60, 0.4))
    pairs = [(a > b) + (a == b) / 2 for a in scores[outcomes] for b in scores[~outcomes]]
    assert auroc(scores, outcomes) == pytest.approx(np.mean(pairs))


def test_brier_score() -> None:
    assert brier_score(FOUR, UPPER) == pytest.approx((0.04 + 0.16 + 0.16 + 0.04) / 4)


def test_of_nothing_there_is_no_measure() -> None:
    for measure in (expected_calibration_error, calibration_noise, corrected_calibration_error, auroc, brier_score):
        assert measure(*NOTHING) is None
    assert reliability_bins(*NOTHING) == []


def test_sigmoid_and_product() -> None:
    assert sigmoid(np.array([-1000.0, 0.0, math.log(3), 1000.0])).tolist() == pytest.approx([0, 0.5, 0.75, 1])
    assert running_product(np.array([[0.5, 0.5, 0.4]])).tolist() == [pytest.approx([0.5, 0.25, 0.1])]
