"""How much of a prompt is read between two rounds."""

from __future__ import annotations

import pytest

from dspark_edge.runtime.batching.prefill_pace import PrefillPace, chunk_sizes


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(64, (8, 16, 32, 64)), (100, (8, 16, 32, 64, 100)), (8, (8,)), (3, (3,)), (1, (1,)), (9, (8, 9))],
)
def test_sizes_double_up_to_the_largest(most: int, sizes: tuple[int, ...]) -> None:
    assert chunk_sizes(most) == sizes


def test_where_nobody_waits_chunks_are_the_largest() -> None:
    pace = PrefillPace(64)
    for _ in range(3):
        pace.observe_chunk(64, 9.0)
        pace.observe_round(0.01)
    assert pace.chunk(decoding=False) == 64


def test_without_a_bound_chunks_are_the_largest() -> None:
    pace = PrefillPace(48, stall=None)
    pace.observe_round(0.001)
    pace.observe_chunk(48, 1.0)
    assert pace.chunk(decoding=True) == 48


def run(pace: PrefillPace, round_s: float, per_token_s: float, count: int, constant_s: float = 0.0) -> list[int]:
    """Rounds with a chunk each, on a device of these costs; the chunks that were chosen."""
    chosen = []
    for _ in range(count):
        size = pace.chunk(decoding=True)
        chosen.append(size)
        pace.observe_chunk(size, constant_s + per_token_s * size)
        pace.observe_round(round_s)
    return chosen


@pytest.mark.parametrize(
    ("round_s", "size"),
    [(0.001, 8), (0.034, 8), (0.054, 16), (0.106, 16), (0.11, 32), (0.22, 64), (10.0, 64)],
)
def test_a_chunk_lengthens_a_round_by_no_more_than_it_may(round_s: float, size: int) -> None:
    chosen = run(PrefillPace(64), round_s, 0.005, 20)
    assert chosen[:2] == [8, 8]  # nothing is known
    assert chosen[-8:] == [size] * 8
    # A size is tried where the one before leaves room, so what is too large takes at most half more than it may.
    assert sum(one > size for one in chosen) <= 2
    assert all(0.005 * one <= 1.5 * 1.5 * round_s for one in chosen if one > size)


def test_where_weights_are_most_of_it_chunks_are_large() -> None:
    """A device that reads weights in 10 ms, whatever the width."""
    assert run(PrefillPace(64), 0.0101, 0.000005, 12, constant_s=0.01)[-1] == 64


def test_a_chunk_that_was_slow_once_is_tried_again() -> None:
    pace = PrefillPace(16)
    pace.observe_round(0.1)
    for seconds in (0.3, 0.02, 0.02):
        assert pace.chunk(decoding=True) == 8
        pace.observe_chunk(8, seconds)
    pace.observe_chunk(16, 0.9)  # its call was bound
    assert pace.chunk(decoding=True) == 16
    pace.observe_chunk(16, 0.04)
    assert pace.chunk(decoding=True) == 8  # one of two says no
    for seconds in (0.03, 0.04, 0.04):
        pace.observe_chunk(16, seconds)
    assert pace.chunk(decoding=True) == 16


def test_rounds_that_become_slower_leave_room_for_larger_chunks() -> None:
    pace = PrefillPace(64)
    assert run(pace, 0.03, 0.005, 30)[-1] == 8
    assert run(pace, 0.12, 0.005, 30)[-1] == 32
    assert run(pace, 0.03, 0.005, 30)[-1] == 8


def test_the_rest_of_a_prompt_teaches_nothing() -> None:
    pace = PrefillPace(64)
    pace.observe_round(0.1)
    for _ in range(3):
        pace.observe_chunk(5, 60.0)
    assert pace.chunk(decoding=True) == 8
