"""Which calls a round takes, and what they are priced at."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest

from dspark_edge.runtime.batching.grouping import DenseGrouping, PackedGrouping, SerialGrouping, TargetCall, runs
from dspark_edge.runtime.batching.pricing import Shared
from dspark_edge.runtime.scheduling import LookAhead, Proposal

ROOMY = (100,) * 8


@dataclass(frozen=True)
class SharedCosts:
    """A call costs 10 and 1 for each token: weights are read once, however many requests there are."""

    def target_s(self, batch: int, width: int, context: int) -> float:
        return 10.0 + batch * width

    def draft_s(self, batch: int, context: int, block: int | None = None) -> float:
        return 2.0 + 0.1 * batch

    def sampler_s(self, batch: int, width: int) -> float:
        return 0.01 * batch * width


def proposal(survivals: tuple[float, ...], expected: tuple[float, ...] | None = None) -> Proposal:
    return Proposal(survivals, expected or survivals, survivals, 100, True)


def test_runs_are_neighbours_of_one_kind() -> None:
    assert list(runs([0, 1, 2, 4, 5, 6], "aabbba")) == [(0, 2), (2, 1), (4, 2), (6, 1)]
    assert list(runs([], "")) == []


def test_a_dense_round_is_one_call_as_wide_as_the_widest() -> None:
    assert DenseGrouping().calls((2, 0, 5), ROOMY[:3]) == (TargetCall(0, (6, 6, 6), (0, 1, 2)),)
    assert DenseGrouping().calls((0, 0), ROOMY[:2]) == (TargetCall(0, (1, 1), (0, 1)),)


def test_who_has_no_room_for_the_width_is_verified_apart() -> None:
    calls = DenseGrouping().calls((5, 1, 5, 3, 0), (9, 2, 9, 3, 0))
    assert calls == (
        TargetCall(0, (6,), (0,)),
        TargetCall(1, (2,), (1,)),
        TargetCall(2, (6,), (2,)),
        TargetCall(3, (4,), (3,)),
        TargetCall(4, (1,), (4,)),
    )


@pytest.mark.parametrize("grouping", [DenseGrouping(), SerialGrouping()], ids=["dense", "serial"])
def test_every_request_is_judged_once_at_its_width_and_inside_its_cache(
    grouping: DenseGrouping | SerialGrouping,
) -> None:
    for lengths in product((0, 1, 3), repeat=4):
        for spare in product((0, 1, 5), repeat=4):
            rooms = tuple(length + extra for length, extra in zip(lengths, spare, strict=True))
            calls = grouping.calls(lengths, rooms)
            assert sorted(slot for call in calls for slot in call.judged) == [0, 1, 2, 3]
            for call in calls:
                slots = range(call.first, call.first + len(call.widths))
                assert set(call.judged) <= set(slots)
                assert all(lengths[slot] < call.widths[slot - call.first] for slot in call.judged)
                assert all(width <= rooms[slot] + 1 for slot, width in zip(slots, call.widths, strict=True))


def test_a_serial_round_has_one_call_for_plain_steps_and_one_for_each_other_request() -> None:
    calls = SerialGrouping().calls((0, 3, 0, 0, 2), ROOMY[:5])
    assert calls == (TargetCall(0, (1, 1, 1, 1), (0, 2, 3)), TargetCall(1, (4,), (1,)), TargetCall(4, (3,), (4,)))
    assert SerialGrouping().calls((1, 2), ROOMY[:2]) == (TargetCall(0, (2,), (0,)), TargetCall(1, (3,), (1,)))


def test_shared_seconds_are_those_of_the_calls() -> None:
    costs = SharedCosts()
    price = Shared(costs).verify_s((0, 3, 0), (5, 6, 7))
    assert price == pytest.approx(costs.target_s(2, 1, 7) + costs.target_s(1, 4, 6) + 0.01 * 2 + 0.01 * 4)
    assert Shared(costs).plain_call((5, 9)) == (2, 1, 9)
    assert Shared(costs).costs.draft_s(3, 0) == pytest.approx(3 * costs.draft_s(1, 0))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_ladders_seconds_add_up_where_nobody_leaves_or_all_do(batch: int) -> None:
    pricing = Shared(SharedCosts())
    group = [proposal((0.99, 0.98, 0.97, 0.96))] * batch
    ladders = pricing.ladders(group)
    contexts = [100] * batch
    assert sum(one.seconds[0] for one in ladders) == pytest.approx(pricing.verify_s((0,) * batch, contexts))
    if batch <= 2:  # where it is best that all leave, says the forecast
        assert sum(one.seconds[4] for one in ladders) == pytest.approx(pricing.verify_s((4,) * batch, contexts))


def test_a_call_of_ones_own_pays_for_few_and_not_for_many() -> None:
    """What speculation gains a request it costs the group a whole call: at some number plain decoding together wins."""
    good, pricing, pace = (0.95, 0.9, 0.85, 0.8), Shared(SharedCosts()), 1.0
    assert LookAhead().lengths([proposal(good)], pricing, pace) == (4,)
    assert LookAhead().lengths([proposal(good)] * 2, pricing, pace) == (4, 4)
    assert LookAhead().lengths([proposal(good)] * 8, pricing, pace) == (0,) * 8


def test_prices_are_made_of_forecasts_and_not_of_live_confidences() -> None:
    """A scheduler's proof of losslessness takes a round's prices for constants."""
    expected = (0.6, 0.4, 0.2)
    seconds = [
        [one.seconds for one in Shared(SharedCosts()).ladders([proposal(live, expected), proposal(expected)])]
        for live in ((0.99, 0.98, 0.97), (0.1, 0.01, 0.001))
    ]
    assert seconds[0] == seconds[1]


def test_who_has_no_draft_stays() -> None:
    ladders = Shared(SharedCosts()).ladders([proposal(()), proposal((0.9, 0.8))])
    assert [len(one.gains) for one in ladders] == [0, 2]
    assert LookAhead().lengths([proposal(()), proposal(())], Shared(SharedCosts()), 1.0) == (0, 0)


def test_a_packed_round_is_one_call_of_the_tokens_there_are() -> None:
    grouping, costs = PackedGrouping(), SharedCosts()
    (call,) = grouping.calls((2, 0, 5), (2, 0, 5))
    assert call == TargetCall(0, (3, 1, 6), (0, 1, 2), packed=True)
    assert call.bucket((100, 200, 600)) == (1, 10, 300)
    assert grouping.pricing(costs).verify_s((2, 0, 5), (100, 200, 600)) == pytest.approx(20.0 + 0.1)


def test_packed_graphs_are_for_several_of_which_one_verifies() -> None:
    """All else the other graphs do as well, or better, and is priced as theirs."""
    grouping, costs = PackedGrouping(), SharedCosts()
    pricing = grouping.pricing(costs)
    (plain,) = grouping.calls((0, 0), (7, 7))
    assert plain == TargetCall(0, (1, 1), (0, 1))
    assert plain.bucket((100, 300)) == pricing.plain_call((100, 300)) == (2, 1, 300)
    assert pricing.verify_s((0, 0), (100, 300)) == costs.target_s(2, 1, 300) + costs.sampler_s(2, 1)
    (alone,) = grouping.calls((3,), (7,))
    assert alone == TargetCall(0, (4,), (0,))
    (ladder,) = pricing.ladders([proposal((0.9, 0.5)), proposal((0.8,))])
    assert ladder.seconds[0] == pricing.verify_s((0, 0), (0, 0))
    assert ladder.seconds[1:] == tuple(pricing.verify_s((length, 0), (0, 0)) for length in (1, 2, 3))
