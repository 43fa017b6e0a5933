"""Whole blocks or short ones: what pays is drafted, at once or after a few trials."""

from __future__ import annotations

import pytest

from dspark_edge.runtime.scheduling import Controller, CorrectedCosts, LookAhead, Offer, ParkingOptions, Serial
from dspark_edge.runtime.scheduling.whole_blocks import WholeBlocks

from .simulation import CONTEXT, DEVICES, Device, best_fixed, make_world, run, table
from .test_simulated_devices import GOOD, MIDDLING, ROUNDS, WORLDS

SHORT = 3


def controller(device: Device, conditionals: list[float] | None = None) -> Controller:
    return Controller(LookAhead(), Serial(device), 7, ParkingOptions(), conditionals, short_block=SHORT)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", DEVICES)
def test_within_three_percent_of_the_best_fixed_length_of_either_block(name: str, world: str) -> None:
    device = DEVICES[name]()
    conditionals = GOOD if world.startswith("good") else MIDDLING
    log = run(controller(device, list(conditionals)), WORLDS[world], device, greedy=True)
    assert log.rate() >= 0.97 * best_fixed(WORLDS[world], device, range(ROUNDS), SHORT)


def test_what_costs_little_is_drafted_whole_and_what_costs_much_short() -> None:
    world = WORLDS["good, told"]
    flat = DEVICES["flat"]()
    assert sum(run(controller(flat, GOOD), world, flat).short) == 0
    steep, world = Device(DEVICES["steep"]().by_tokens, draft=2.0), WORLDS["middling, told"]
    log = run(controller(steep, MIDDLING), world, steep)
    whole = [drafted and not short for drafted, short in zip(log.drafted, log.short, strict=True)]
    assert 1 <= sum(whole) <= 0.1 * sum(log.drafted)  # trials


def test_a_calibration_that_promises_too_little_is_found_out() -> None:
    """Whole blocks are tried now and then, and kept once they have paid."""
    device, world = DEVICES["flat"](), make_world(5, GOOD, rounds=200)
    log = run(controller(device, [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1]), world, device)
    assert log.short[0] and sum(log.short[100:]) < 20


def test_a_promise_that_is_not_kept_is_found_out() -> None:
    device = Device(table([6.4, 7.9, 9.4, 10.6, 12.1, 13.6, 15.9, 18.1]), draft=2.0)
    world = make_world(6, [0.9, 0.8, 0.5, 0.1, 0.1, 0.1, 0.1], rounds=200)
    log = run(controller(device, [0.95] * 7), world, device)
    assert not log.short[0] and sum(log.short[100:]) > 80


def test_trials_back_off_and_a_lucky_one_is_no_proof() -> None:
    blocks, whole = WholeBlocks(-0.2), []
    for round_ in range(200):
        if blocks.pay():
            whole.append(round_)
            blocks.observe(-0.3)
        else:
            blocks.passed()
    assert whole == [8, 25, 58, 123, 188]
    blocks.observe(1.0)  # a quarter of the way: it pays until it has lost that
    assert blocks.pay()
    for _ in range(3):
        blocks.observe(-0.3)
    assert not blocks.pay()


def test_probes_are_short() -> None:
    """Whether the first tokens pay is all that a parked sequence asks."""
    device = DEVICES["flat"]()
    one = controller(device, GOOD)
    state = one.join()
    assert one.short_block(state, CONTEXT) is None  # whole blocks pay here
    state.parking = state.parking._replace(probing=True)
    assert one.short_block(state, CONTEXT) == SHORT
    plan = one.plan([state], [Offer(SHORT, (0.9,) * SHORT, CONTEXT, True, SHORT)])
    assert plan.draft_s == device.draft_s(1, CONTEXT, SHORT) < device.draft_s(1, CONTEXT)


def test_blocks_of_each_size_are_corrected_by_their_own_times() -> None:
    costs = CorrectedCosts(Device(lambda tokens: 10.0, draft=2.0))
    for _ in range(30):
        costs.observe_draft(1, CONTEXT, 4.0)
        costs.observe_draft(1, CONTEXT, costs.base.draft_s(1, CONTEXT, SHORT), SHORT)
    assert costs.draft_s(1, CONTEXT) == pytest.approx(4.0, rel=0.05)
    assert costs.draft_s(1, CONTEXT, SHORT) == pytest.approx(costs.base.draft_s(1, CONTEXT, SHORT), rel=0.05)


def test_without_a_short_block_nothing_is_short() -> None:
    device = DEVICES["very steep"]()
    plain = Controller(LookAhead(), Serial(device), 7, ParkingOptions(), GOOD)
    assert not any(run(plain, WORLDS["good, told"], device).short)
