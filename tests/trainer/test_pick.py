"""Next tokens of logits: greedy, and drawn by uniforms."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="picking tokens in torch needs the [train] extra")

import torch

from dspark_edge.trainer.responses.torch_responder import pick

pytestmark = pytest.mark.needs_export


def picked(logits: npt.ArrayLike, temperatures: Sequence[float], uniforms: Sequence[float]) -> list[int]:
    rows = torch.as_tensor(np.asarray(logits, dtype=np.float32))
    chosen = pick(rows, torch.tensor(temperatures), torch.tensor(uniforms, dtype=torch.float32))
    assert chosen.dtype == torch.int64 and chosen.shape == rows.shape[:1]
    return list(chosen.tolist())


@pytest.mark.parametrize("vocabulary", [1, 5, 256, 257, 1000])
def test_greedy_takes_the_largest(vocabulary: int) -> None:
    logits = np.random.default_rng(0).normal(size=(6, vocabulary))
    assert picked(logits, [0.0] * 6, [0.99] * 6) == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("vocabulary", [5, 256, 300])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(vocabulary: int, temperature: float) -> None:
    random = np.random.default_rng(1)
    logits = random.normal(size=vocabulary) * 1.5
    count = 40_000
    uniforms = random.random(count, dtype=np.float32)
    tokens = picked(np.tile(logits, (count, 1)), [temperature] * count, uniforms.tolist())
    weights = np.exp(logits / temperature)
    expected = count * weights / weights.sum()
    observed = np.bincount(tokens, minlength=vocabulary)
    # Tokens that are expected fewer than five times are counted together.
    few = expected < 5
    observed = np.append(observed[~few], observed[few].sum())
    expected = np.append(expected[~few], expected[few].sum())
    kept = expected > 0
    chi_square = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    freedom = kept.sum() - 1
    # Five standard deviations above the mean of the chi-square distribution.
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_draws_are_the_inverse_of_the_distribution_function() -> None:
    logits = np.random.default_rng(2).normal(size=700)
    cumulative = np.cumsum(np.exp(logits) / np.exp(logits).sum())
    inside = [3, 255, 256, 257, 511, 512, 699]  # at the edges of the blocks, too
    middles = [(cumulative[token] + cumulative[token - 1]) / 2 for token in inside]
    assert picked(np.tile(logits, (len(inside), 1)), [1.0] * len(inside), middles) == inside


@pytest.mark.parametrize("vocabulary", [3, 256, 260, 1025])
@pytest.mark.parametrize("temperature", [1e-3, 1.0, 100.0])
def test_the_ends_never_draw_what_has_no_probability(vocabulary: int, temperature: float) -> None:
    random = np.random.default_rng(3)
    ends = [0.0, float(np.nextafter(np.float32(1), np.float32(0))), 2.0**-24, 0.5]
    for _ in range(20):
        possible = random.random(vocabulary) < 0.1
        possible[random.integers(vocabulary)] = True
        logits = np.where(possible, random.normal(size=vocabulary) * 3, -np.inf)
        chosen = picked(np.tile(logits, (4, 1)), [temperature] * 4, ends)
        assert possible[chosen].all()
        if temperature >= 1:
            assert chosen[0] == np.flatnonzero(possible)[0] and chosen[1] == np.flatnonzero(possible)[-1]


def test_one_possible_token_is_drawn_always() -> None:
    logits = np.full((5, 513), -1e9)
    places = [0, 255, 256, 511, 512]
    logits[range(5), places] = 3.0
    assert picked(logits, [1.0] * 5, [0.0, 0.25, 0.5, 0.75, 0.9999999]) == places


def test_temperatures_of_a_wave_are_its_rows_own() -> None:
    random = np.random.default_rng(4)
    logits, uniforms = random.normal(size=(5, 260)), random.random(5).tolist()
    temperatures = [0.0, 1.0, 0.0, 0.5, 2.0]
    together = picked(logits, temperatures, uniforms)
    for row in range(5):
        assert picked(logits[[row]], [temperatures[row]], [uniforms[row]]) == [together[row]]
    assert together[0] == logits[0].argmax() and together[2] == logits[2].argmax()
