"""From measured points to costs: monotone, on steps where there are steps, and beyond what was measured."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.profile_costs import CostModel, CostTable, find_tile, fit_table, isotonic, monotone_fit


def table(
    costs: object,
    batches: tuple[int, ...] = (1,),
    widths: tuple[int, ...] = (1,),
    contexts: tuple[int, ...] = (0,),
) -> CostTable:
    medians = np.array(costs, np.float64).reshape(len(batches), len(widths), len(contexts))
    return fit_table(batches, widths, contexts, medians, np.full(medians.shape, 0.01))


@pytest.mark.parametrize(
    ("values", "weights", "expected"),
    [
        ([1, 2, 3], [1, 1, 1], [1, 2, 3]),
        ([3, 2, 1], [1, 1, 1], [2, 2, 2]),
        ([1, 3, 2, 4], [1, 1, 1, 1], [1, 2.5, 2.5, 4]),
        ([1, 3, 2, 4], [1, 3, 1, 1], [1, 2.75, 2.75, 4]),  # the more precise one moves less
        ([5, 4, 6, 2], [1, 1, 1, 1], [4.25, 4.25, 4.25, 4.25]),  # 4.5, then (6 + 2) / 2 = 4 pools with them
        ([7], [1], [7]),
    ],
)
def test_violators_are_pooled_by_weight(values: list[float], weights: list[float], expected: list[float]) -> None:
    assert isotonic(np.array(values, float), np.array(weights, float)).tolist() == pytest.approx(expected)


def test_a_monotone_grid_is_left_as_it_is() -> None:
    grid = np.array([[1.0, 2.0], [1.5, 2.0], [4.0, 8.0]])
    assert monotone_fit(grid, np.ones_like(grid)).tolist() == grid.tolist()


def test_the_fit_of_a_grid_is_the_closest_one() -> None:
    # Only the corner is out of order: it and its three neighbours meet where their squares are least.
    grid = np.array([[4.0, 1.0], [1.0, 4.0]])
    assert monotone_fit(grid, np.ones_like(grid)) == pytest.approx(np.array([[2.0, 2.0], [2.0, 4.0]]))


def test_a_precise_point_moves_less_than_a_noisy_one() -> None:
    fitted = fit_table((1,), (1, 2), (0,), np.array([[[2.0], [1.0]]]), np.array([[[0.01], [0.1]]]))
    assert fitted.at(1, 1, 0) == fitted.at(1, 2, 0) == pytest.approx((2.0 * 100 + 1.0) / 101)


@pytest.mark.parametrize(
    ("widths", "costs", "tile"),
    [
        ((1, 4, 5, 8, 9, 12), (10, 10, 15, 15, 20, 20), 4),
        ((1, 8, 9, 16), (10, 10.1, 20, 20.1), 8),
        ((1, 2, 3, 4, 5, 6, 7, 8), (10, 10, 10, 10, 10, 10, 10, 10), 1),  # flat all along
        ((1, 2, 3, 4, 5, 6, 7, 8), (10, 11, 12, 13, 14, 15, 16, 17), 1),  # a slope
        ((1, 2, 4, 8, 16), (10, 10, 10, 14, 20), 1),  # flat, then a slope: only one step was measured twice
        ((1, 4, 5, 8), (10, 10, 10.2, 10.2), 1),  # a rise of 2 % may be noise
        ((1, 4, 5, 8), (10, 12, 15, 17), 1),  # steps that are not flat
        ((1,), (10,), 1),
    ],
)
def test_staircases_are_told_from_other_curves(widths: tuple[int, ...], costs: tuple[float, ...], tile: int) -> None:
    assert find_tile(widths, costs) == tile


def test_between_widths_costs_lie_on_a_straight_line() -> None:
    costs = table([10, 12, 20], widths=(1, 3, 7))
    assert [costs.at(1, width, 0) for width in range(1, 8)] == pytest.approx([10, 11, 12, 14, 16, 18, 20])


def test_between_widths_costs_lie_on_steps_where_they_were_measured_so() -> None:
    # Tiles of 8: 9 and 16 were measured on the second step, 24 ends the third, 33 stands on the fifth.
    costs = table([10, 10, 20, 20, 30, 50], widths=(1, 8, 9, 16, 24, 33))
    assert [costs.at(1, width, 0) for width in (2, 7, 8, 9, 12, 16)] == pytest.approx([10, 10, 10, 20, 20, 20])
    assert [costs.at(1, width, 0) for width in (17, 20, 24)] == pytest.approx([30, 30, 30])
    assert [costs.at(1, width, 0) for width in (25, 32, 33)] == pytest.approx([40, 40, 50])


def test_beyond_the_widest_costs_rise_with_the_last_slope() -> None:
    straight = table([10, 12, 18], widths=(1, 2, 4))
    assert straight.at(1, 6, 0) == pytest.approx(24)
    steps = table([10, 10, 20, 20], widths=(1, 8, 9, 16))  # flat at its end, 10 for each 8
    assert steps.at(1, 24, 0) == pytest.approx(30)
    assert table([10], widths=(2,)).at(1, 6, 0) == pytest.approx(30)  # one width: in proportion


def test_between_and_beyond_contexts() -> None:
    costs = table([10, 20, 24], contexts=(100, 200, 300))
    assert [costs.at(1, 1, context) for context in (0, 100, 150, 200, 250, 300, 350)] == pytest.approx(
        [10, 10, 15, 20, 22, 24, 26]
    )
    assert table([10], contexts=(100,)).at(1, 1, 5000) == 10


def test_between_and_beyond_batches() -> None:
    costs = table([[10, 20], [18, 40], [26, 50]], batches=(1, 3, 4), widths=(1, 2))
    assert [costs.at(batch, 1, 0) for batch in (1, 2, 3, 4, 6)] == pytest.approx([10, 14, 18, 26, 42])
    assert costs.at(2, 2, 0) == pytest.approx(30)
    assert table([10], batches=(1,)).at(4, 1, 0) == pytest.approx(40)  # one batch: in proportion
    assert table([10], batches=(4,)).at(2, 1, 0) == pytest.approx(10)  # a call for 2 is at most one for 4


def test_impossible_calls_are_refused() -> None:
    costs = table([10])
    for batch, width in ((0, 1), (1, 0), (-1, 1)):
        with pytest.raises(InvalidInputError, match=f"batch {batch} and width {width}"):
            costs.at(batch, width, 0)


def test_a_model_asks_the_right_tables() -> None:
    target = table([10, 20, 12, 24], widths=(1, 2), contexts=(0, 100))
    model = CostModel(target, table([3, 5], contexts=(0, 100)), table([1, 2], widths=(1, 2)))
    assert model.target_s(1, 2, 50) == pytest.approx(18)
    assert model.draft_s(1, 50) == pytest.approx(4)
    assert model.sampler_s(1, 2) == pytest.approx(2)


axis = st.lists(st.integers(1, 40), min_size=1, max_size=5, unique=True).map(lambda sizes: tuple(sorted(sizes)))


@st.composite
def grids(draw: st.DrawFn) -> tuple[CostTable, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    batches, widths, contexts = (
        draw(axis.filter(lambda sizes: sizes[-1] <= 8) | st.just((1, 2, 4))),
        draw(axis),
        draw(axis),
    )
    shape = (len(batches), len(widths), len(contexts))
    # Levels that repeat make staircases, of another tile for each batch.
    levels = st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0, 10.0]) | st.floats(0, 1e3)
    count = int(np.prod(shape))
    medians = np.array(draw(st.lists(levels, min_size=count, max_size=count))).reshape(shape)
    errors = np.array(draw(st.lists(st.floats(1e-6, 10), min_size=count, max_size=count))).reshape(shape)
    return fit_table(batches, widths, contexts, medians, errors), batches, widths, contexts


@settings(max_examples=60, deadline=None)
@given(grids())
def test_costs_never_fall(case: tuple[CostTable, tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> None:
    costs, batches, widths, contexts = case
    of_batch = [*range(1, batches[-1] + 3)]
    of_width = sorted({1, 2, 3, 5, 8, 9, *widths, widths[-1] + 1, widths[-1] + 9})
    of_context = sorted({0, 1, 7, *contexts, contexts[-1] + 1, contexts[-1] + 100})
    grid = np.array([costs.at(*call) for call in product(of_batch, of_width, of_context)])
    grid = grid.reshape(len(of_batch), len(of_width), len(of_context))
    assert np.isfinite(grid).all() and (grid >= 0).all()
    for along in range(3):
        assert (np.diff(grid, axis=along) >= -1e-9 * (1 + grid.max())).all()


@settings(max_examples=60, deadline=None)
@given(grids())
def test_a_row_is_its_costs_one_by_one(
    case: tuple[CostTable, tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> None:
    costs, batches, widths, contexts = case
    for batch, widest, context in product(
        (1, batches[-1] + 1), (1, widths[-1] + 3), (0, contexts[0], contexts[-1] - 1, contexts[-1] + 50)
    ):
        row = costs.row(batch, widest, max(context, 0))
        assert row == pytest.approx([costs.at(batch, width, max(context, 0)) for width in range(1, widest + 1)])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=12, max_size=12), st.integers(0, 9))
def test_measured_costs_that_never_fall_are_kept(rises: list[int], first: int) -> None:
    medians = first + 1.0 + np.array(rises, float).reshape(2, 3, 2).cumsum(0).cumsum(1).cumsum(2)
    costs = fit_table((1, 4), (1, 3, 8), (10, 20), medians, np.full(medians.shape, 0.5))
    # A table on steps keeps them as well: steps are at what was measured.
    for (b, batch), (w, width), (c, context) in product(enumerate((1, 4)), enumerate((1, 3, 8)), enumerate((10, 20))):
        assert costs.at(batch, width, context) == pytest.approx(medians[b, w, c])
