"""Parking: the state machine by hand, and what hopeless and hopeful prompts cost in simulation."""

from __future__ import annotations

import pytest

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.scheduling import Controller, Dense, LookAhead, Offer, Packed, Parking, ParkingOptions, Serial
from dspark_edge.runtime.scheduling.parking import NOTHING_KNOWN, Evidence, forecast_evidence, start
from dspark_edge.runtime.scheduling.plan import round_evidence

from .simulation import CONTEXT, Device, Log, make_world, run, run_group, table

OPTIONS = ParkingOptions()
BAD, GOOD = Evidence(1.0, 1.35), Evidence(3.0, 1.5)


def drafted_rounds(state: Parking, round_: Evidence, rounds: int) -> list[int]:
    """In which of the next rounds the sequence drafts, if each draft turns out so."""
    drafted = []
    for index in range(rounds):
        if state.parked:
            state = state.after_parked_rounds(1, OPTIONS)
        else:
            drafted.append(index)
            state = state.after_drafted_round(round_, OPTIONS)
    return drafted


def test_probes_back_off() -> None:
    assert drafted_rounds(start(NOTHING_KNOWN, OPTIONS), BAD, 300) == [0, 3, 8, 17, 34, 67, 132, 197, 262]


def test_what_pays_is_never_parked() -> None:
    assert drafted_rounds(start(NOTHING_KNOWN, OPTIONS), GOOD, 20) == list(range(20))


def test_a_sequence_starts_parked_where_the_engine_does_not_pay() -> None:
    assert drafted_rounds(start(Evidence(10.0, 13.0), OPTIONS), BAD, 128) == [8, 25, 58, 123]
    assert drafted_rounds(start(Evidence(20.0, 13.0), OPTIONS), GOOD, 3) == [0, 1, 2]


def test_a_lasting_change_resets_the_wait_and_a_lucky_probe_does_not() -> None:
    state = Parking(NOTHING_KNOWN, 64, 0, True)
    state = state.after_drafted_round(GOOD, OPTIONS)
    assert (state.parked, state.wait) == (False, 32)
    for _ in range(6):
        state = state.after_drafted_round(GOOD, OPTIONS)
    assert state.wait == OPTIONS.first_wait


def test_drafting_loses_what_it_won_and_no_more() -> None:
    state = start(NOTHING_KNOWN, OPTIONS)
    for _ in range(10):
        state = state.after_drafted_round(GOOD, OPTIONS)
    assert state.bank == OPTIONS.most_bank
    lost = 0
    while not state.parked:
        state = state.after_drafted_round(BAD, OPTIONS)
        lost += 1
    assert lost == 8  # 3 by 0.377
    assert state.bank == 0


def test_a_few_good_rounds_pay_for_many() -> None:
    """One of four wins 1.5, three lose 0.35: the gain is 1.09, though most rounds do not pay."""
    rounds = [Evidence(3.0, 1.5), BAD, BAD, BAD] * 10
    state, parked = start(NOTHING_KNOWN, OPTIONS), 0
    for round_ in rounds:
        parked += state.parked
        state = state.after_parked_rounds(1, OPTIONS) if state.parked else state.after_drafted_round(round_, OPTIONS)
    assert parked == 0


def test_a_probe_decides_by_itself() -> None:
    state = Parking(Evidence(10.0, 13.5), 64, 32, True)
    while state.parked:
        state = state.after_parked_rounds(1, OPTIONS)
    assert not state.after_drafted_round(Evidence(1.8, 1.5), OPTIONS).parked
    assert state.after_drafted_round(Evidence(1.5, 1.5), OPTIONS).remaining == 64


def test_forecasts_take_the_best_fixed_length() -> None:
    found = forecast_evidence((0.5, 0.5), (10.0, 12.0, 30.0), 3.0)
    assert (found.tokens, found.plain_tokens) == pytest.approx((1.5, 1.5))
    assert forecast_evidence((0.1,), (10.0, 12.0), 3.0).gain == pytest.approx(1 / 1.3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"probe_share": -0.1},
        {"most_allowance": -1.0},
        {"margin": -0.1},
        {"memory": 1.0},
        {"stake": 0.0},
        {"first_wait": 0},
        {"start_wait": 100},
        {"longest_wait": 4},
    ],
)
def test_options_out_of_range_are_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidInputError, match="expected"):
        ParkingOptions(**wrong)  # type: ignore[arg-type]


def make_controller(device: Device, conditionals: list[float] | None = None) -> Controller:
    return Controller(LookAhead(), Dense(device), 7, OPTIONS, conditionals)


def cost_by_plain(log: Log, device: Device) -> float:
    return (device.target_s(1, 1, CONTEXT) + device.sampler_s(1, 1)) / (1 / log.rate())


HOPELESS = make_world(3, [0.05] * 7, rounds=140)
TABLES = {
    "steep": [6.4, 7.9, 9.4, 10.6, 12.1, 13.6, 15.9, 18.1],
    "fp32": [19.7, 23.5, 25.0, 24.5, 25.6, 26.7, 29.2, 31.7],
}


@pytest.mark.parametrize("name", TABLES)
def test_a_hopeless_answer_costs_two_percent_at_most(name: str) -> None:
    """128 tokens, a draft for 0.35 plain steps: the first request, nothing known, and later ones."""
    device = Device(table(TABLES[name]), draft=0.35 * TABLES[name][0])
    controller = make_controller(device)
    costs = []
    for _ in range(3):
        log = run(controller, HOPELESS, device, tokens=128)
        costs.append(1 / cost_by_plain(log, device))
    assert costs[0] <= 1.02
    assert max(costs[1:]) < costs[0]  # they start parked
    assert controller.gain() < 1


def test_a_hopeless_request_behind_good_ones_is_parked_by_its_own_rounds() -> None:
    device = Device(table(TABLES["fp32"]), draft=0.35 * TABLES["fp32"][0])
    controller = make_controller(device)
    run(controller, make_world(1, [0.8] * 7, rounds=60), device)
    assert controller.gain() > 1.2
    assert 1 / cost_by_plain(run(controller, HOPELESS, device, tokens=128), device) <= 1.03


def test_a_calibration_without_hope_parks_the_first_request() -> None:
    device = Device(table(TABLES["steep"]), draft=0.35 * 6.4)
    log = run(make_controller(device, [0.1] * 7), HOPELESS, device, tokens=8)
    assert not any(log.drafted)


def test_a_prompt_that_turns_good_is_noticed_within_the_back_off() -> None:
    device = Device(table(TABLES["fp32"]), draft=4.0)
    world = make_world(5, [0.8] * 7, rounds=200)
    turn = 80
    world.truth[:turn], world.confidences[:turn] = 0.03, 0.03
    log = run(make_controller(device), world, device)
    first = next(round_ for round_ in range(turn, 200) if log.drafted[round_])
    assert first - turn <= OPTIONS.longest_wait
    assert sum(log.drafted[first : first + 40]) >= 35


def test_a_drafter_without_confidences_is_probed_by_outcomes() -> None:
    """Prompt lookup: a draft costs nothing, a probe verifies one token."""
    device = Device(table(TABLES["steep"]), draft=0.01)
    hopeless = run(make_controller(device), HOPELESS, device, tokens=128, informed=False)
    assert all(length for length, drafted in zip(hopeless.lengths, hopeless.drafted, strict=True) if drafted)
    assert 1 / cost_by_plain(hopeless, device) < 1.05
    world = make_world(5, [0.9] * 7, rounds=60, spread=0.1)
    good = run(make_controller(device), world, device, informed=False)
    assert cost_by_plain(good, device) > 1.5


@pytest.mark.parametrize("kind", [Dense, Serial, Packed])
def test_the_time_of_a_round_is_divided_completely(kind: type[Dense] | type[Serial] | type[Packed]) -> None:
    device = Device(table([10.0, 11.0]), draft=3.0)
    controller = Controller(LookAhead(), kind(device), 3, OPTIONS)
    states = [controller.join() for _ in range(3)]
    offers = [
        Offer(3, (0.9, 0.9, 0.9), CONTEXT, False),
        Offer(3, (0.1, 0.1, 0.1), CONTEXT, True),
        Offer(0, None, CONTEXT, False),
    ]
    plan = controller.plan(states, offers)
    evidence = round_evidence(plan, plan.lengths)
    assert plan.lengths[0] > 0
    seconds = plan.draft_s + plan.verify_s
    assert sum(one.plain_tokens for one in evidence) == pytest.approx(3 * seconds / plan.plain_s)
    assert evidence[2] == Evidence(1.0, 1.0)
    assert evidence[0].plain_tokens > evidence[1].plain_tokens  # the hopeless one does not make it wider


def test_sequences_whose_wait_is_nearly_over_probe_with_the_one_that_drafts() -> None:
    controller = make_controller(Device(table([10.0, 11.0]), draft=3.0), [0.05] * 7)
    states = [controller.join() for _ in range(4)]
    states[0].parking = states[3].parking = Parking(NOTHING_KNOWN, 2)
    states[1].parking = Parking(NOTHING_KNOWN, 64, 30, True)
    states[2].parking = Parking(NOTHING_KNOWN, 64, 16, True)
    assert controller.drafting(states, [CONTEXT] * 4) == (True, False, True, True)
    assert controller.drafting(states[1:3], [CONTEXT] * 2) == (False, False)  # both parked: nobody drafts


def test_a_hopeful_sequence_joins_where_others_draft() -> None:
    controller = make_controller(Device(table([10.0, 11.0]), draft=3.0), [0.5] * 7)
    states = [controller.join() for _ in range(2)]
    states[1].parking = Parking(NOTHING_KNOWN, 64, 60, True)
    assert controller.drafting(states, [CONTEXT] * 2) == (True, True)
    assert controller.drafting(states[1:], [CONTEXT]) == (False,)


class OneByOne(Device):
    """Drafts a sequence a call."""

    def draft_s(self, batch: int, context: int, block: int | None = None) -> float:
        return self.draft * batch


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("conditionals", [None, [0.5] * 7], ids=["nothing known", "calibrated"])
def test_short_answers_in_groups_where_drafts_are_dear_are_hardly_probed(
    size: int, conditionals: list[float] | None
) -> None:
    """A draft holds up the whole group; answers of 64 tokens, one group after another. (One lucky probe is 1 %.)"""
    pricing = Dense(OneByOne(lambda tokens: 6.0 + 2.4 * tokens, draft=3.0))
    controller = Controller(LookAhead(), pricing, 7, OPTIONS, conditionals)
    worlds = [make_world(40 + seed, [0.3] * 7, rounds=64) for seed in range(size)]
    logs = [run_group(controller, pricing, worlds, True) for _ in range(6)]
    seconds = sum(sum(log.seconds) for log in logs) / sum(sum(log.tokens) for log in logs)
    assert seconds <= (1.02 if size > 1 else 1.025) * pricing.verify_s((0,) * size, [CONTEXT] * size) / size


def test_a_probe_waits_until_the_allowance_pays_for_it() -> None:
    pricing = Dense(OneByOne(table([10.0, 15.0]), draft=8.0))
    controller = Controller(LookAhead(), pricing, 7, OPTIONS, [0.05] * 7)
    states = [controller.join(2) for _ in range(2)]
    for state in states:
        state.parking = Parking(NOTHING_KNOWN, 8, 0, True)
    assert controller.drafting(states, [CONTEXT] * 2) == (True, False)  # 1 plain token each, and there is 1 to spend
    offer = Offer(7, (0.05,) * 7, CONTEXT, True), Offer(0, None, CONTEXT, True)
    controller.record(states, controller.plan(states, offer), [0, 0])
    assert [state.parking.asks for state in states] == [False, True]
    waited = 0
    while not any(drafting := controller.drafting(states, [CONTEXT] * 2)):
        nothing = [Offer(0, None, CONTEXT, True)] * 2
        controller.record(states, controller.plan(states, nothing), [0, 0])
        waited += 1
    assert drafting == (False, True)  # it has waited longer
    # A hundredth of two tokens a round, less since the first probe lost, and a debt of a tenth.
    assert waited == pytest.approx(55 / controller.gain(2) ** 4, rel=0.06)


def test_a_lost_stake_is_paid_from_the_allowance() -> None:
    """Short hopeless answers, one after another, where the engine's calibration says that drafting pays."""
    pricing = Dense(Device(lambda tokens: 9.0 + tokens, draft=3.0))
    controller = Controller(LookAhead(), pricing, 7, OPTIONS, [0.7] * 7)
    assert not controller.join().parking.parked
    drafted = []
    for _ in range(12):
        state = controller.join()
        # Whatever was learned of others.
        state.parking = start(Evidence(1.5, 1.0), OPTIONS, max(-controller._allowance, 0.0))
        rounds = 0
        for _ in range(64):
            drafts = controller.drafting([state], [CONTEXT])[0]
            offer = Offer(7, (0.02,) * 7, CONTEXT, True) if drafts else Offer(0, None, CONTEXT, True)
            controller.record([state], controller.plan([state], [offer]), [0])
            rounds += drafts
        drafted.append(rounds)
    assert drafted[0] >= 4  # of the stake, and probes that the allowance pays for
    assert sum(drafted[4:]) / 8 * 0.3 / 64 < 0.01  # later what the debt leaves of the stake, and hardly a probe
    assert -OPTIONS.most_allowance <= controller._allowance <= OPTIONS.most_allowance


def test_a_new_sequence_may_lose_the_more_the_surer_drafting_pays() -> None:
    def bank(gain: float, debt: float = 0.0) -> float:
        return start(Evidence(gain, 1.0), OPTIONS, debt).bank

    assert bank(1.0 + OPTIONS.sure_gain) == pytest.approx(bank(2.0)) == pytest.approx(OPTIONS.stake)
    assert bank(1.0 + OPTIONS.sure_gain / 2) == pytest.approx(OPTIONS.stake / 2)
    assert bank(2.0, debt=0.4) == pytest.approx(OPTIONS.stake - 0.4)
    assert start(Evidence(1.1, 1.0), OPTIONS, debt=0.6).parked
    assert start(Evidence(1.01, 1.0), OPTIONS).parked  # within the margin


def test_what_is_won_is_in_the_bank_or_in_the_allowance_and_not_in_both() -> None:
    won = Evidence(3.0, 1.0)
    room = Parking(NOTHING_KNOWN, 2, bank=0.5)
    assert room.allowance_change(won, OPTIONS) == 0.0
    assert room.after_drafted_round(won, OPTIONS).bank == pytest.approx(0.5 + won.won(OPTIONS))
    full = Parking(NOTHING_KNOWN, 2, bank=OPTIONS.most_bank - 0.5)
    assert full.allowance_change(won, OPTIONS) == pytest.approx(won.won(OPTIONS) - 0.5)
    assert full.after_drafted_round(won, OPTIONS).bank == OPTIONS.most_bank


def test_only_probes_and_first_rounds_lose_from_the_allowance() -> None:
    lost = Evidence(1.0, 1.5)
    probe, first = Parking(NOTHING_KNOWN, 2, probing=True), start(Evidence(1.5, 1.0), OPTIONS)
    proven = first.after_drafted_round(Evidence(3.0, 1.0), OPTIONS)
    assert probe.allowance_change(lost, OPTIONS) == first.allowance_change(lost, OPTIONS) == lost.won(OPTIONS) < 0
    assert proven.allowance_change(lost, OPTIONS) == 0.0  # it loses what it has won


def test_groups_start_by_what_drafting_brings_in_groups() -> None:
    """For one sequence drafting pays; for four, one draft after the other, it does not."""
    pricing = Dense(OneByOne(table([10.0, 10.5, 11.0, 11.5]), draft=4.0))
    controller = Controller(LookAhead(), pricing, 3, OPTIONS, [0.5] * 3)
    assert controller.gain() > 1.1 > 1 > controller.gain(4)
    assert not controller.join().parking.parked
    assert controller.join(4).parking.parked


def test_a_plain_round_finds_out_what_plain_decoding_costs_by_now() -> None:
    doubt = 0.0
    device = Device(table([10.0, 11.0]), draft=3.0)
    controller = Controller(LookAhead(), Dense(device), 7, OPTIONS, target_doubt=lambda *call: doubt)
    states = [controller.join()]
    assert controller.drafting(states, [CONTEXT]) == (True,)
    doubt = 0.5
    assert controller.drafting(states, [CONTEXT]) == (False,)
    assert controller.drafting(states, [CONTEXT]) == (True,)  # one, even if nothing came of it


def test_a_parked_group_may_rest_until_the_first_wait_ends() -> None:
    controller = make_controller(Device(table([10.0, 11.0]), draft=3.0), [0.05] * 7)
    states = [controller.join() for _ in range(3)]
    states[0].parking = Parking(NOTHING_KNOWN, 64, 30, True)
    states[1].parking = Parking(NOTHING_KNOWN, 8, 3, True)
    states[2].parking = Parking(NOTHING_KNOWN, 8, 0, True)  # it waits until a probe can be paid
    plan = controller.plain([CONTEXT] * 3)
    assert controller.record(states, plan, [0] * 3) == 2
    controller.rested(states, 2)
    assert [state.parking.remaining for state in states] == [27, 0, 0]
    assert controller.record(states[:1], plan, [0]) == 3  # never longer than that


def test_rounds_of_rest_count_as_others_do() -> None:
    device = Device(table([10.0, 11.0]), draft=3.0)
    one, other = (make_controller(device, [0.05] * 7) for _ in range(2))
    state, same = one.join(), other.join()
    state.parking = same.parking = Parking(Evidence(1.0, 2.0), 64, 30, True)
    plan = one.plain([CONTEXT])
    for _ in range(4):
        one.record([state], plan, [0])
    other.record([same], plan, [0])
    other.rested([same], 3)
    assert same.parking.evidence == pytest.approx(state.parking.evidence)
    assert same.parking._replace(evidence=NOTHING_KNOWN) == state.parking._replace(evidence=NOTHING_KNOWN)
    assert other._allowance == pytest.approx(one._allowance) and other._rounds_since_check == one._rounds_since_check


def test_nobody_rests_who_drafts_or_only_looks_at_plain_decoding() -> None:
    controller = make_controller(Device(table([10.0, 11.0]), draft=3.0), [0.9] * 7)
    state = controller.join()
    assert not state.parking.parked
    assert controller.record([state], controller.plain([CONTEXT]), [0]) == 0
    plan = controller.plan([state], [Offer(7, (0.9,) * 7, CONTEXT, True)])
    assert controller.record([state], plan, plan.lengths) == 0


def test_what_deciding_takes_is_charged_to_drafting() -> None:
    controller = make_controller(Device(table([10.0, 11.0]), draft=3.0), [0.05] * 7)
    plan = controller.plan([controller.join()], [Offer(7, (0.9,) * 7, CONTEXT, True)])
    (free,), (charged,) = round_evidence(plan, (3,)), round_evidence(plan, (3,), overhead_s=plan.plain_s / 2)
    assert charged.tokens == free.tokens and charged.plain_tokens == pytest.approx(free.plain_tokens + 0.5)
    before = controller.gain(4)
    controller.observe_overhead(plan.plain_s)
    assert controller.gain(2) < before  # of a size of group that nothing was known of
