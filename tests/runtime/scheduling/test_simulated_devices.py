"""Scheduling against the best fixed length found afterwards, on simulated devices, with the same luck for all."""

from __future__ import annotations

import pytest

from dspark_edge.runtime.scheduling import (
    Controller,
    CorrectedCosts,
    Dense,
    EarlyStop,
    Lagged,
    LookAhead,
    Packed,
    ParkingOptions,
    Pricing,
    Scheduler,
    Serial,
)

from .simulation import (
    CONTEXT,
    DEVICES,
    Device,
    Log,
    World,
    best_fixed,
    best_fixed_group,
    make_world,
    run,
    run_fixed,
    run_group,
    table,
)

GOOD = [0.85, 0.83, 0.8, 0.78, 0.75, 0.72, 0.7]
MIDDLING = [0.65, 0.6, 0.57, 0.55, 0.5, 0.5, 0.5]
ROUNDS = 300
WORLDS = {
    "good, told": make_world(1, GOOD, rounds=ROUNDS),
    "good, half told": make_world(1, GOOD, rounds=ROUNDS, told=0.5),
    "middling, told": make_world(2, MIDDLING, rounds=ROUNDS),
    "middling, not told": make_world(2, MIDDLING, rounds=ROUNDS, told=0.0),
}


def controller(scheduler: Scheduler, device: Device) -> Controller:
    return Controller(scheduler, Dense(device), 7, ParkingOptions())


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", DEVICES)
def test_within_three_percent_of_the_best_fixed_length(name: str, world: str, greedy: bool) -> None:
    device = DEVICES[name]()
    log = run(controller(LookAhead(), device), WORLDS[world], device, greedy=greedy)
    assert log.rate() >= 0.97 * best_fixed(WORLDS[world], device, range(ROUNDS))


@pytest.mark.parametrize("told", [0.5, 1.0])
def test_a_drafter_that_gains_little_is_not_parked_away(told: float) -> None:
    """In the mean over answers: luck parks one of them for a while now and then."""
    device, shares, gains = DEVICES["fp32"](), [], []
    for seed in range(4):
        world = make_world(seed, [0.34] + [0.3] * 6, rounds=250, told=told)
        best = best_fixed(world, device, range(250))
        gains.append(best / run_fixed(world, device, 0, range(250)))
        shares.append(run(controller(LookAhead(), device), world, device).rate() / best)
    assert 1.05 < sum(gains) / 4 < 1.15
    assert sum(shares) / 4 >= 0.97
    assert min(shares) >= 0.9


@pytest.mark.parametrize("name", ["flat", "fp32", "steep"])
def test_early_stop_is_enough_where_costs_rise_evenly(name: str) -> None:
    device, world = DEVICES[name](), WORLDS["middling, told"]
    assert run(controller(EarlyStop(), device), world, device).rate() >= 0.97 * best_fixed(world, device, range(ROUNDS))


def test_looking_ahead_is_what_a_staircase_needs() -> None:
    device, world = DEVICES["high stairs"](), WORLDS["good, told"]
    stop, look = (run(controller(one, device), world, device).rate() for one in (EarlyStop(), LookAhead()))
    assert look > 1.08 * stop


def test_the_lagged_rule_gains_though_it_is_blind() -> None:
    for name in ("staircase", "flat", "fp32"):
        device, world = DEVICES[name](), WORLDS["good, half told"]
        log = run(controller(Lagged(), device), world, device)
        assert log.rate() > 0.9 * best_fixed(world, device, range(ROUNDS))
        assert log.rate() > 1.5 * run_fixed(world, device, 0, range(ROUNDS))


HOPELESS = [0.05] * 7
GROUPS = {
    "alike": [make_world(seed, MIDDLING, rounds=120) for seed in range(10, 14)],
    "one good of four": [make_world(20 + seed, GOOD if seed == 0 else HOPELESS, rounds=120) for seed in range(4)],
    "hopeless": [make_world(seed, HOPELESS, rounds=120) for seed in range(30, 34)],
}


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", [Dense, Serial, Packed])
@pytest.mark.parametrize("name", ["staircase", "fp32", "very steep"])
def test_groups_are_within_three_percent_of_the_best_length_for_all(
    name: str, kind: type[Dense] | type[Serial] | type[Packed], group: str, greedy: bool
) -> None:
    pricing: Pricing = kind(DEVICES[name]())
    log = run_group(Controller(LookAhead(), pricing, 7, ParkingOptions()), pricing, GROUPS[group], greedy)
    assert log.rate() >= 0.97 * best_fixed_group(pricing, GROUPS[group])


def run_changing(base: Device, device: Device, world: World, half: int, wide_only: bool) -> Log:
    """A machine that is as profiled up to a round, and then twice as slow: all of it, or its wide calls."""
    costs = CorrectedCosts(base)

    def before(round_: int) -> None:
        if round_ == half:
            device.slower, device.slower_wide = (1.0, 2.5) if wide_only else (2.0, 1.0)

    def after(round_: int, log: Log) -> None:
        width = 1 + log.lengths[-1]
        costs.observe_target(1, width, CONTEXT, device.target_s(1, width, CONTEXT))
        costs.observe_sampler(1, width, device.sampler_s(1, width))
        if log.drafted[-1]:
            costs.observe_draft(1, CONTEXT, device.draft_s(1, CONTEXT))

    learner = Controller(LookAhead(), Dense(costs), 7, ParkingOptions(), target_doubt=costs.target_doubt)
    return run(learner, world, device, before=before, after=after)


@pytest.mark.parametrize("wide_only", [False, True], ids=["all", "wide calls"])
def test_a_machine_that_changes_half_way_is_followed_within_twenty_rounds(wide_only: bool) -> None:
    values = [6.4, 7.9, 9.4, 10.6, 12.1, 13.6, 15.9, 18.1]
    base, device = Device(table(values), draft=1.0), Device(table(values), draft=1.0)
    world, half = WORLDS["middling, told"], ROUNDS // 2
    log = run_changing(base, device, world, half, wide_only)
    settled = half + 20
    assert log.rate(0, half) >= 0.97 * best_fixed(world, Device(table(values), draft=1.0), range(half))
    assert log.rate(settled) >= 0.97 * best_fixed(world, device, range(settled, ROUNDS))
    errors = sorted(
        abs(predicted / seconds - 1)
        for predicted, seconds in zip(log.predicted[settled:], log.seconds[settled:], strict=True)
    )
    assert errors[len(errors) // 2] < 0.15
    if wide_only:  # verifying costs more than it brings now
        assert sum(log.drafted[settled:]) < 0.3 * (ROUNDS - settled)
