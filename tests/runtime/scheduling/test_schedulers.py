"""Schedulers on hand-sized numbers, and what must hold for any numbers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_edge.runtime.scheduling import (
    Dense,
    EarlyStop,
    Lagged,
    LookAhead,
    Packed,
    Plain,
    Pricing,
    Proposal,
    Scheduler,
    Serial,
    Static,
    Threshold,
)
from dspark_edge.runtime.scheduling.history import survivals_of
from dspark_edge.runtime.scheduling.schedulers import admission_thresholds, best_rung, climb

STAIRS = (10.0, 14.0, 14.0, 14.0, 18.0, 18.0)  # by tokens of a call, from 1


@dataclass
class Table:
    """Costs by tokens of a call, seconds; counts how often it is asked."""

    steps: tuple[float, ...]
    draft: float = 0.0
    short_draft: float = 0.0  # of any block but a whole one
    asked: list[int] = field(default_factory=list)

    def target_s(self, batch: int, width: int, context: int) -> float:
        self.asked.append(batch * width)
        return self.steps[min(batch * width, len(self.steps)) - 1]

    def draft_s(self, batch: int, context: int, block: int | None = None) -> float:
        return self.draft if block is None else self.short_draft

    def sampler_s(self, batch: int, width: int) -> float:
        return 0.0


def proposal(
    conditionals: tuple[float, ...],
    expected: tuple[float, ...] | None = None,
    lagged: tuple[float, ...] | None = None,
    greedy: bool = False,
) -> Proposal:
    live = survivals_of(conditionals)
    return Proposal(
        live,
        live if expected is None else survivals_of(expected),
        live if lagged is None else survivals_of(lagged),
        100,
        greedy,
    )


def test_plain_static_and_threshold_need_no_costs() -> None:
    group = [proposal((0.9, 0.5, 0.5)), proposal((0.9,)), proposal(())]
    pricing = Dense(Table(STAIRS))
    assert Plain().lengths(group, pricing, 1.0) == (0, 0, 0)
    assert Static(2).lengths(group, pricing, 1.0) == (2, 1, 0)
    assert Threshold(0.45).lengths(group, pricing, 1.0) == (2, 1, 0)
    assert Threshold(0.2).lengths(group, pricing, 1.0) == (3, 1, 0)


def test_early_stop_admits_while_the_throughput_rises() -> None:
    # plain 1/10; one token 1.8/11 = 0.164; two 2.44/12 = 0.203; three 2.5/13 = 0.192
    pricing = Dense(Table((10.0, 11.0, 12.0, 13.0)))
    assert EarlyStop().lengths([proposal((0.8, 0.8, 0.1))], pricing, 1.0) == (2,)


def test_early_stop_counts_the_draft() -> None:
    one = [proposal((0.12,))]
    costs = Table((10.0, 11.5))
    assert EarlyStop().lengths(one, Dense(costs), 1.0) == (0,)  # 1.12/11.5 < 1/10
    costs.draft = 10.0
    assert EarlyStop().lengths(one, Dense(costs), 1.0) == (1,)  # 1.12/21.5 > 1/20
    short = [one[0]._replace(block=3)]
    assert EarlyStop().lengths(short, Dense(costs), 1.0) == (0,)  # what was paid for a short draft is less


def test_early_stop_does_not_cross_a_step_that_later_tokens_repay() -> None:
    steps = (10.0, 20.0, 20.0, 20.0, 20.0)
    group = [proposal((0.9, 0.9, 0.9, 0.9))]
    assert EarlyStop().lengths(group, Dense(Table(steps)), 1.0) == (0,)  # 1.9/20 < 1/10, but 4.1/20 is not
    assert LookAhead().lengths(group, Dense(Table(steps)), 1.0) == (4,)


def test_look_ahead_crosses_a_step_by_what_is_expected_not_by_what_is_there() -> None:
    pricing = Dense(Table((10.0, 20.0, 20.0, 20.0, 20.0)))
    poor, good = (0.9, 0.1, 0.1, 0.1), (0.9, 0.9, 0.9, 0.9)
    assert LookAhead().lengths([proposal(poor, expected=good)], pricing, 1.0) == (4,)  # a step once paid is free
    assert LookAhead().lengths([proposal(good, expected=poor)], pricing, 1.0) == (0,)
    assert LookAhead().lengths([proposal(good, expected=poor, greedy=True)], pricing, 1.0) == (4,)


def test_a_higher_pace_makes_seconds_dearer() -> None:
    group = [proposal((0.5, 0.5, 0.5))]
    pricing = Dense(Table((10.0, 12.0, 14.0, 16.0)))
    lengths = [LookAhead().lengths(group, pricing, pace) for pace in (1.0, 1.5, 3.0)]
    assert lengths == [(2,), (1,), (0,)]  # gains 0.5, 0.25, 0.125 against 0.2 · pace


def test_a_dense_group_is_decided_by_its_sum_and_stays_level() -> None:
    pricing = Dense(Table((10.0, 10.0, 15.0, 15.0, 21.0, 21.0)))
    group = [proposal((0.9, 0.9)), proposal((0.2, 0.1))]
    # A second is worth 0.2 tokens: 0.9 + 0.2 pays for the first level's 5, 0.81 + 0.02 not for the second's 6.
    assert LookAhead().lengths(group, pricing, 1.0) == (1, 1)
    assert LookAhead().lengths(group[1:] * 2, pricing, 1.0) == (0, 0)


def test_a_packed_group_takes_the_likeliest_tokens_of_all() -> None:
    pricing = Packed(Table((10.0, 10.0, 11.0, 12.0, 13.0, 14.0)))
    group = [proposal((0.9, 0.9)), proposal((0.1, 0.1))]
    for scheduler in (EarlyStop(), LookAhead()):
        assert scheduler.lengths(group, pricing, 1.0) == (2, 0)


def test_serial_requests_are_decided_one_by_one() -> None:
    pricing = Serial(Table((10.0, 11.0, 12.0)))
    group = [proposal((0.9, 0.9)), proposal((0.05, 0.9)), proposal(())]
    assert LookAhead().lengths(group, pricing, 1.0) == (2, 0, 0)
    assert EarlyStop().lengths(group, pricing, 1.0) == (2, 0, 0)


def test_lagged_takes_the_number_from_the_past_and_the_tokens_from_now() -> None:
    pricing = Packed(Table((10.0, 10.0, 11.0, 12.0, 13.0, 14.0)))
    group = [proposal((0.1, 0.1), lagged=(0.9, 0.9)), proposal((0.95, 0.9), lagged=(0.01, 0.01))]
    assert Lagged().lengths(group, pricing, 1.0) == (0, 2)
    one = [proposal((0.01, 0.01), lagged=(0.9, 0.9))]
    assert Lagged().lengths(one, Dense(Table((10.0, 11.0, 12.0))), 1.0) == (2,)


def test_prices_are_those_of_the_calls() -> None:
    costs = Table((1.0, 2.0, 4.0, 8.0, 16.0, 32.0))
    assert Dense(costs).verify_s((0, 2), (5, 9)) == 32.0  # 2 × 3 tokens
    assert Serial(costs).verify_s((0, 2), (5, 9)) == 1.0 + 4.0
    assert Packed(costs).verify_s((0, 2), (5, 9)) == 8.0  # 1 + 3 tokens
    assert [pricing.plain_call((5, 9)) for pricing in (Dense(costs), Serial(costs), Packed(costs))] == [
        (2, 1, 9),
        (1, 1, 5),
        (2, 1, 9),
    ]


chances = st.floats(0.0, 1.0)
blocks = st.lists(chances, min_size=1, max_size=6).map(tuple)
prices = st.lists(st.floats(0.1, 10.0), min_size=25, max_size=25).map(
    lambda steps: tuple(itertools.accumulate(steps, max))
)
NON_ANTICIPATING: list[Scheduler] = [EarlyStop(), LookAhead(), Threshold(0.3)]


@st.composite
def ladders(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    gains = draw(st.lists(st.floats(0.01, 1.0), max_size=8))
    seconds = draw(st.lists(st.floats(0.1, 10.0), min_size=len(gains) + 1, max_size=len(gains) + 1))
    return gains, seconds


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ladders(), st.floats(0.1, 5.0))
def test_the_best_rung_is_the_best_of_all(ladder: tuple[list[float], list[float]], rate: float) -> None:
    gains, seconds = ladder
    values = [sum(gains[:rung]) - rate * seconds[rung] for rung in range(len(seconds))]
    assert values[best_rung(gains, seconds, rate)] == pytest.approx(max(values))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ladders(), st.floats(0.1, 5.0))
def test_thresholds_are_those_of_the_definition(ladder: tuple[list[float], list[float]], rate: float) -> None:
    expected, seconds = ladder
    wanted = [
        min(
            rate * expected[rung] * (seconds[end] - seconds[rung]) / sum(expected[rung:end])
            for end in range(rung + 1, len(seconds))
        )
        for rung in range(len(expected))
    ]
    assert admission_thresholds(expected, seconds, rate) == pytest.approx(wanted)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ladders(), st.floats(0.1, 5.0))
def test_with_right_forecasts_climbing_finds_the_best_rung(
    ladder: tuple[list[float], list[float]], rate: float
) -> None:
    gains, seconds = ladder
    values = [sum(gains[:rung]) - rate * seconds[rung] for rung in range(len(seconds))]
    rung = climb(gains, admission_thresholds(gains, seconds, rate))
    assert values[rung] == pytest.approx(max(values), abs=1e-6)


@pytest.mark.parametrize("scheduler", NON_ANTICIPATING, ids=lambda one: type(one).__name__)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(blocks, min_size=1, max_size=4), prices, st.data())
def test_confidences_behind_the_first_refused_token_change_nothing(
    scheduler: Scheduler, group: list[tuple[float, ...]], steps: tuple[float, ...], data: st.DataObject
) -> None:
    """One order for all requests: what is refused has not been looked behind."""
    kind = data.draw(st.sampled_from([Dense, Serial, Packed]))
    pricing: Pricing = kind(Table(steps, draft=1.0))
    past = tuple(data.draw(blocks) for _ in group)

    def chosen(rows: list[tuple[float, ...]]) -> tuple[int, ...]:
        proposals = []
        for row, means in zip(rows, past, strict=True):
            expected = (means + (0.5,) * 6)[: len(row)]
            proposals.append(proposal(row, expected))
        return scheduler.lengths(proposals, pricing, 1.2)

    lengths = chosen(group)
    assert all(length <= len(row) for length, row in zip(lengths, group, strict=True))
    changed = [
        row[: length + 1] + tuple(data.draw(chances) for _ in row[length + 1 :])
        for row, length in zip(group, lengths, strict=True)
    ]
    assert chosen(changed) == lengths


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(blocks, min_size=1, max_size=3), prices, st.sampled_from([1.0, 1.7]))
def test_greedy_requests_get_the_best_lengths_of_all(
    group: list[tuple[float, ...]], steps: tuple[float, ...], pace: float
) -> None:
    group = [row[:3] for row in group]
    for kind in (Dense, Serial, Packed):
        pricing: Pricing = kind(Table(steps))
        proposals = [proposal(row, greedy=True) for row in group]
        contexts = [one.context for one in proposals]
        rate = pace * len(group) / pricing.verify_s([0] * len(group), contexts)

        def value(
            lengths: tuple[int, ...],
            proposals: list[Proposal] = proposals,
            pricing: Pricing = pricing,
            contexts: list[int] = contexts,
            rate: float = rate,
        ) -> float:
            gain = sum(sum(one.survivals[:length]) for one, length in zip(proposals, lengths, strict=True))
            return gain - rate * pricing.verify_s(lengths, contexts)

        best = max(map(value, itertools.product(*(range(len(row) + 1) for row in group))))
        assert value(LookAhead().lengths(proposals, pricing, pace)) == pytest.approx(best, abs=1e-6)


@pytest.mark.parametrize("kind", [Dense, Serial, Packed])
def test_the_work_of_a_decision_is_bounded(kind: type[Dense] | type[Serial] | type[Packed]) -> None:
    """Batch 8, block 7: at most a price for every token, and one more for each call, or for the plain one."""
    costs = Table(tuple(10.0 + count for count in range(64)))
    group = [proposal((0.9,) * 7, (0.8,) * 7) for _ in range(8)]
    LookAhead().lengths(group, kind(costs), 1.5)
    assert len(costs.asked) <= 8 * (7 + 1) + 1
