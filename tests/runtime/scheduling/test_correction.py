"""Costs that follow the machine."""

from __future__ import annotations

import math

import pytest

from dspark_edge.runtime.scheduling import CorrectedCosts
from dspark_edge.runtime.scheduling.costs import verification_row

from .simulation import Device

BASE = Device(lambda tokens: 10.0 + tokens, draft=3.0)


def observe(costs: CorrectedCosts, width: int, factor: float, rounds: int = 1) -> None:
    for _ in range(rounds):
        costs.observe_target(1, width, 200, factor * BASE.target_s(1, width, 200))


def test_without_observations_it_is_the_profile() -> None:
    costs = CorrectedCosts(BASE)
    assert costs.target_s(2, 3, 100) == BASE.target_s(2, 3, 100)
    assert costs.draft_s(1, 100) == 3.0
    assert costs.sampler_s(1, 2) == BASE.sampler_s(1, 2)


def test_a_machine_that_becomes_twice_as_slow_is_followed_everywhere() -> None:
    costs = CorrectedCosts(BASE)
    observe(costs, 4, 1.0, 40)
    observe(costs, 4, 2.0, 20)
    assert costs.target_s(1, 4, 200) == pytest.approx(2 * BASE.target_s(1, 4, 200), rel=0.1)
    assert costs.target_s(1, 1, 200) == pytest.approx(2 * BASE.target_s(1, 1, 200), rel=0.1)  # never observed
    assert costs.draft_s(1, 200) == pytest.approx(6.0, rel=0.1)
    observe(costs, 4, 1.0, 20)
    assert costs.target_s(1, 1, 200) == pytest.approx(BASE.target_s(1, 1, 200), rel=0.1)


def test_single_outliers_move_next_to_nothing() -> None:
    costs = CorrectedCosts(BASE)
    observe(costs, 4, 1.0, 10)
    for _ in range(3):
        observe(costs, 4, 30.0)
        assert costs.target_s(1, 4, 200) == pytest.approx(BASE.target_s(1, 4, 200), rel=0.03)
        observe(costs, 4, 1.0, 5)


def test_a_bucket_that_is_off_by_itself_is_learned_without_the_others() -> None:
    costs = CorrectedCosts(BASE)
    for _ in range(200):
        for width, factor in ((1, 1.0), (2, 1.0), (4, 1.0), (8, 1.3)):
            observe(costs, width, factor)
    for width, factor in ((1, 1.0), (2, 1.0), (4, 1.0), (8, 1.3)):
        assert costs.target_s(1, width, 200) == pytest.approx(factor * BASE.target_s(1, width, 200), rel=0.1)


def test_a_row_is_its_costs_one_by_one() -> None:
    costs = CorrectedCosts(BASE)
    for width, factor in ((1, 1.5), (4, 1.9), (4, 2.0)):
        costs.observe_target(2, width, 100, factor * BASE.target_s(2, width, 100))
        costs.observe_sampler(2, width, 3.0 * max(BASE.sampler_s(2, width), 1e-3))
    row = costs.verification_row(2, 6, 100)
    one_by_one = [costs.target_s(2, width, 100) + costs.sampler_s(2, width) for width in range(1, 7)]
    assert row == pytest.approx(one_by_one) == verification_row(costs, 2, 6, 100)
    assert verification_row(BASE, 1, 2, 0) == [
        BASE.target_s(1, width, 0) + BASE.sampler_s(1, width) for width in (1, 2)
    ]


def test_drafts_and_acceptance_have_their_own_ratio() -> None:
    costs = CorrectedCosts(BASE)
    for _ in range(40):
        costs.observe_draft(1, 200, 4.5)
        costs.observe_sampler(1, 3, 2 * BASE.sampler_s(1, 3))
    assert costs.draft_s(1, 200) == pytest.approx(4.5, rel=0.05)
    assert costs.sampler_s(1, 3) == pytest.approx(2 * BASE.sampler_s(1, 3), rel=0.05)
    assert costs.drift == 1.0


def test_verification_times_are_split() -> None:
    costs = CorrectedCosts(BASE)
    for _ in range(20):
        costs.observe_verification(1, 4, 200, 2 * BASE.target_s(1, 4, 200) + BASE.sampler_s(1, 4))
    assert costs.target_s(1, 4, 200) == pytest.approx(2 * BASE.target_s(1, 4, 200), rel=0.05)


def test_what_was_not_seen_since_the_machine_changed_is_doubtful() -> None:
    costs = CorrectedCosts(BASE)
    observe(costs, 1, 1.0, 10)
    observe(costs, 4, 1.0, 10)
    assert costs.target_doubt(1, 1, 200) < 0.01
    observe(costs, 4, 2.0, 30)  # wide calls alone became slower
    assert costs.target_doubt(1, 1, 200) == pytest.approx(math.log(2), rel=0.15)
    observe(costs, 1, 1.0)
    assert costs.target_s(1, 1, 200) < 1.3 * BASE.target_s(1, 1, 200)
    assert costs.target_s(1, 4, 200) > 1.7 * BASE.target_s(1, 4, 200)


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_times_that_are_none_are_ignored(seconds: float) -> None:
    costs = CorrectedCosts(BASE)
    costs.observe_target(1, 4, 200, seconds)
    costs.observe_draft(1, 200, seconds)
    assert (costs.target_s(1, 4, 200), costs.draft_s(1, 200)) == (BASE.target_s(1, 4, 200), 3.0)
