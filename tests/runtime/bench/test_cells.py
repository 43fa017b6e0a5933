"""From runs to cells, on numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dspark_edge.runtime.bench.bench import parts_of, workload
from dspark_edge.runtime.bench.cells import Cell, Place, cells_of, worst_first
from dspark_edge.runtime.bench.contenders import Run
from dspark_edge.runtime.bench.settings import rotated

PLACE = Place("bundle", "fp32", "math", 0.0, 2)


def run(speed: float, **changes: Any) -> Run:
    given: dict[str, Any] = {
        "tokens": 100,
        "decode_s": 100 / speed,
        "rounds": 50,
        "committed": 101,
        "steps": 30,
        "observed_s": 2.0,
        "parked_s": 0.5,
        "schedule_s": 0.003,
        "prediction_error": None,
        "answers": ((1, 2), (3,)),
    }
    return Run(**(given | changes))


def by_mode(cells: list[Cell]) -> dict[str, Cell]:
    return {cell.mode: cell for cell in cells}


def test_ratios_are_of_one_repeat_each() -> None:
    # The machine was twice as fast in the second repeat: medians of ratios do not see that.
    runs = {
        "plain": [[run(10)], [run(20)], [run(10)]],
        "static": [[run(5)], [run(10)], [run(5)]],
        "scheduled": [[run(12)], [run(24)], [run(11)]],
    }
    cells = by_mode(cells_of(PLACE, runs, None))
    assert cells["scheduled"].speedup == pytest.approx(1.2)
    assert cells["scheduled"].of_best == pytest.approx(1.2)  # plain is the best of the others
    assert cells["static"].speedup == pytest.approx(0.5) and cells["static"].of_best == pytest.approx(10 / 24)
    assert cells["plain"].speedup is None and cells["plain"].of_best == pytest.approx(10 / 12)


def test_medians_spreads_and_shares() -> None:
    runs = {"plain": [[run(speed, prediction_error=speed / 100)] for speed in (10, 30, 20)]}
    (cell,) = cells_of(PLACE, runs, ((1, 2), (3,)))
    assert cell.tokens_per_second == 20 and cell.spread == pytest.approx(1.0)
    assert cell.accepted_length == pytest.approx(101 / 50)
    assert cell.parked_share == pytest.approx(0.25)
    assert cell.mean_concurrency == pytest.approx(50 / 30)
    assert cell.schedule_us == pytest.approx(100)
    assert cell.prediction_error == 0.2
    assert (cell.requests, cell.tokens, cell.same_answers) == (2, 100, 1.0)
    assert (cell.bundle, cell.precision, cell.domain, cell.concurrency) == ("bundle", "fp32", "math", 2)


def test_a_repeat_is_the_whole_of_its_parts() -> None:
    slow, fast = run(10, answers=((1, 2),), prediction_error=0.1), run(30, answers=((3,),), prediction_error=0.3)
    (cell,) = cells_of(PLACE, {"plain": [[slow, fast]]}, ((1, 2), (3,)))
    assert cell.tokens_per_second == pytest.approx(200 / (10 + 100 / 30))
    assert cell.accepted_length == pytest.approx(101 / 50) and cell.schedule_us == pytest.approx(100)
    assert (cell.requests, cell.tokens, cell.same_answers) == (2, 200, 1.0)
    assert cell.prediction_error == pytest.approx(0.2)


def test_the_error_is_of_what_equal_parts_differ_by() -> None:
    # Two prompts, one gains much and the other nothing: no error, as long as each does so in every repeat.
    plain = [[run(10), run(10)], [run(20), run(20)]]
    sure = by_mode(cells_of(PLACE, {"plain": plain, "static": [[run(30), run(10)], [run(60), run(20)]]}, None))
    assert sure["static"].speedup_error == pytest.approx(0.0)
    assert sure["plain"].speedup_error is None
    # ln(1.1 / 0.9) apart within a part, nothing within the other: variance ln² / 2 on two degrees, over four ratios.
    noisy = by_mode(cells_of(PLACE, {"plain": plain, "static": [[run(11), run(10)], [run(18), run(20)]]}, None))
    apart = math.log(1.1 / 0.9)
    typical = (1.1 * 0.9) ** (1 / 4)
    assert noisy["static"].speedup_error == pytest.approx(typical * (apart**2 / 2 / 2 / 4) ** 0.5)


def test_one_repeat_has_no_error() -> None:
    cells = by_mode(cells_of(PLACE, {"plain": [[run(10)]], "static": [[run(12)]]}, None))
    assert cells["static"].speedup_error is None


def test_answers_are_compared_one_by_one() -> None:
    runs = {"static": [[run(10)], [run(10, answers=((1, 2),)), run(10, answers=((4,),))]]}
    (cell,) = cells_of(PLACE, runs, ((1, 2), (3,)))
    assert cell.same_answers == pytest.approx(3 / 4)


def test_nothing_is_divided_by_zero() -> None:
    nothing = run(1, tokens=0, decode_s=0.0, rounds=0, committed=0, steps=0, observed_s=0.0, parked_s=0.0)
    cells = cells_of(PLACE, {"plain": [[nothing], [nothing]], "static": [[nothing], [nothing]]}, None)
    assert {cell.tokens_per_second for cell in cells} == {0.0}


def test_the_worst_scheduled_cell_is_first() -> None:
    runs = {"plain": [[run(10)]], "scheduled": [[run(11)]]}
    other = Place("bundle", "int4", "chat", 1.0, 1)
    worse = {"plain": [[run(10)]], "scheduled": [[run(9)]]}
    ordered = worst_first([*cells_of(PLACE, runs, None), *cells_of(other, worse, None)])
    assert [(cell.mode, cell.domain) for cell in ordered[:2]] == [("scheduled", "chat"), ("scheduled", "math")]
    assert {cell.mode for cell in ordered[2:]} == {"plain"}


def test_a_workload_fills_its_rounds() -> None:
    assert workload(["a", "b", "c"], 1) == [0, 1, 2]
    assert workload(["a", "b", "c"], 2) == [0, 1, 2, 0]
    assert workload(["a"], 1) == [0]


def test_parts_are_as_small_as_rounds_stay_full() -> None:
    assert parts_of([0, 1, 2], 1) == [range(1), range(1, 2), range(2, 3)]
    assert parts_of([0, 1, 2, 0], 2) == [range(4)]
    assert parts_of([*range(9)], 2) == [range(4), range(4, 9)]


def test_turns_rotate() -> None:
    assert [rotated(3, turn) for turn in range(4)] == [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]
