from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.sampling import RandomStream, SamplingParams


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"seed": -1},
        {"stop": "text"},
        {"stop": ("",)},
    ],
)
def test_values_out_of_range_are_refused_by_name(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(values))):
        SamplingParams(**values)


def test_what_a_request_needs_follows_from_its_values() -> None:
    assert SamplingParams().greedy
    assert not SamplingParams(temperature=0.5).greedy
    assert not SamplingParams(temperature=1.0).filtered
    assert all(SamplingParams(**one).filtered for one in ({"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}))


def test_equal_seeds_give_equal_streams() -> None:
    first, second, other = RandomStream(5), RandomStream(5), RandomStream(6)
    assert np.array_equal(first.uniforms(2, 3), second.uniforms(2, 3))
    assert np.array_equal(first.gumbels(4), second.gumbels(4))
    assert not np.array_equal(RandomStream(5).uniforms(9), other.uniforms(9))


def test_random_numbers_have_their_ranges_and_types() -> None:
    stream = RandomStream(0)
    uniforms, gumbels = stream.uniforms(20_000), stream.gumbels(20_000)
    assert uniforms.dtype == gumbels.dtype == np.float32
    assert uniforms.min() >= 0 and uniforms.max() < 1
    assert abs(gumbels.mean() - 0.5772) < 0.03  # Euler's constant
