"""Scheduling as a round uses it: who drafts, how much is verified, what is learned.

    controller = Controller(LookAhead(), Dense(costs), block_size)      # one an engine
    state = controller.join()                                           # one a sequence

    drafting = controller.drafting(states, contexts)                    # before drafting: who does
    plan = controller.plan(states, offers)                              # lengths for verification
    controller.record(states, plan, accepted)                           # what came of it

Holds all that is remembered from round to round; each decision is a pure function of it (`schedulers.py`,
`parking.py`). No array, no token and no clock comes in here: observed times go into `CorrectedCosts`.

Lossless at temperature > 0, since the state is of earlier rounds only and the scheduler states its own reason. Earlier
rounds of *all* sequences: what is drawn now is independent of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dspark_edge.runtime.scheduling.history import History, unknown_acceptance
from dspark_edge.runtime.scheduling.ladder import Proposal
from dspark_edge.runtime.scheduling.parking import (
    NOTHING_KNOWN,
    Evidence,
    Parking,
    ParkingOptions,
    forecast_evidence,
    start,
)
from dspark_edge.runtime.scheduling.plan import Offer, Plan, round_evidence
from dspark_edge.runtime.scheduling.pricing import Pricing
from dspark_edge.runtime.scheduling.schedulers import Scheduler
from dspark_edge.runtime.scheduling.whole_blocks import WholeBlocks, forecast_whole_blocks

__all__ = ["Controller", "SequenceState"]

# What the engine knows of whether drafting pays: the last fifty or so drafted rounds of its sequences.
_ENGINE_MEMORY = 0.98
# A drift of the costs by this (logarithm) since plain decoding was last timed calls for a plain round. Where drafting
# gains little it is a matter of a few percent: with 0.25, int4 code was drafted for whole answers at a loss of 8 % ...
_DOUBT = 0.1
# ... but not for many: it may be that nothing is timed at that size.
_ROUNDS_BETWEEN_CHECKS = 8
# The more drafting has gained lately, the likelier a probe finds that it pays, and the more is lost by waiting for one:
# probes earn by its gain to this power. Where groups of two in fp32 drafted for code, at 0.88 of plain decoding, that
# is 0.6 of what they had.
_HOPE, _MOST_HOPE = 4, 5.0
# Behind a round without a draft, most rounds that are not decided on. The model has pushed all this out of the caches
# when it is asked again: a decision takes 0.2 ms then, five times as long as in a loop of its own.
_MOST_REST = 3


@dataclass(slots=True)
class SequenceState:
    """What is remembered of one sequence."""

    history: History
    parking: Parking


class Controller:
    """Scheduling and parking of one engine. Not for several threads at once.

    Args:
        scheduler: chooses verify lengths.
        pricing: how the engine verifies a group, and the costs.
        block_size: γ.
        options: of parking; None: never park (a scheduler of fixed lengths is to be measured as it is).
        conditionals: [γ] mean conditional acceptance by position, of a calibration; None: nothing is known.
        target_doubt: `CorrectedCosts.target_doubt`, where the costs are corrected.
        short_block: tokens of a draft that costs less than a block, for single sequences; 0: there is none.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pricing: Pricing,
        block_size: int,
        options: ParkingOptions | None = None,
        conditionals: Sequence[float] | None = None,
        target_doubt: Callable[[int, int, int], float] | None = None,
        short_block: int = 0,
    ) -> None:
        self._scheduler, self._pricing, self._options = scheduler, pricing, options
        self._block_size = block_size
        self._acceptance = unknown_acceptance(block_size, conditionals)
        self._conditionals = conditionals
        self._evidence: dict[int, Evidence] = {}  # by size of the group, within a factor of two
        self._allowance = 0.0 if options is None else options.most_allowance  # plain tokens that probes may cost
        self._overhead_s = 0.0  # a drafted round
        self._target_doubt = target_doubt
        self._rounds_since_check = _ROUNDS_BETWEEN_CHECKS
        self._short = short_block or None
        self._whole_blocks = WholeBlocks(forecast_whole_blocks(conditionals, pricing, block_size, short_block))

    @property
    def block_size(self) -> int:
        """γ."""
        return self._block_size

    def short_block(self, state: SequenceState, context: int) -> int | None:
        """Tokens of the short draft that a sequence is to get; None: a whole block.

        A probe is short, since it asks whether the first tokens pay. Otherwise it depends on what the tokens behind a
        short draft have brought lately.
        """
        if self._short is None:
            return None
        return self._short if state.parking.probing or not self._whole_blocks.pay() else None

    def observe_overhead(self, seconds: float) -> None:
        """Deciding and learning took so long in a round with a draft: it is charged to drafting."""
        share = 1 - _ENGINE_MEMORY if self._overhead_s else 1.0
        self._overhead_s += share * (seconds - self._overhead_s)

    def gain(self, group: int = 1) -> float:
        """Tokens a second by those of plain decoding, over recent drafted rounds of groups of about this size."""
        return self._evidence_of(group).gain

    def join(self, group: int = 1) -> SequenceState:
        """The state of a new sequence.

        Args:
            group: how many sequences are decoded together, the new one included.
        """
        evidence = self._evidence_of(group)
        options = self._options
        parking = Parking(evidence, 1) if options is None else start(evidence, options, max(-self._allowance, 0.0))
        return SequenceState(History(self._block_size, self._acceptance), parking)

    def drafting(self, states: Sequence[SequenceState], contexts: Sequence[int]) -> tuple[bool, ...]:
        """Which sequences are to be drafted for in this round.

        Those that are not parked, and probes as far as the engine's allowance goes. Where one drafts, a parked one
        joins if its wait is nearly over and the allowance pays for it, or if its first token is expected to be worth
        one more sequence in the drafter's call: together they may pay for what none pays for alone. And nobody drafts
        in a round that is to find out what plain decoding costs by now.
        """
        if self._options is None:
            return (True,) * len(states)
        parkings = [state.parking for state in states]
        drafting = [not (one.parked or one.probing) for one in parkings]
        if not any(drafting) and not any(one.asks for one in parkings):
            return (False,) * len(states)
        if self._plain_is_doubtful(contexts):
            return (False,) * len(states)
        willing = sum(drafting)
        if willing == len(states):
            return (True,) * len(states)
        costs, context = self._pricing.costs, max(contexts)
        tokens_by_second = len(states) / self._pricing.verify_s((0,) * len(states), contexts)
        full = self._options.most_allowance
        left, paid = self._allowance, costs.draft_s(willing, context) if willing else 0.0
        # Who has waited is served before who would only join, and who has been looked at less before others.
        turns = sorted((not one.asks, one.wait, index) for index, one in enumerate(parkings) if not drafting[index])
        for joins, wait, index in turns:
            if joins and not willing:
                break
            price = costs.draft_s(willing + 1, context, self._short)
            more = (price - paid + (0.0 if willing else self._overhead_s)) * tokens_by_second
            hopeful = willing > 0 and states[index].history.expected[0] > 2 * more
            if not hopeful:
                # One that costs more than can be saved is paid for afterwards.
                if min(more, full) > left or (joins and parkings[index].remaining * 4 > wait):
                    continue
                left -= more
            drafting[index] = True
            willing, paid = willing + 1, price
        return tuple(drafting)

    def plan(self, states: Sequence[SequenceState], offers: Sequence[Offer]) -> Plan:
        """Verify lengths for the group, at most what each offers."""
        contexts = [offer.context for offer in offers]
        drafted = sum(offer.drafted > 0 for offer in offers)
        if not drafted:
            return self.plain(contexts)
        plain_s = self._pricing.verify_s((0,) * len(offers), contexts)
        proposals = tuple(
            Proposal(
                state.history.live(offer.confidences, offer.drafted),
                state.history.expected[: offer.drafted],
                state.history.lagged(offer.drafted) if self._scheduler.looks_back else (),
                offer.context,
                offer.greedy,
                offer.block,
            )
            for state, offer in zip(states, offers, strict=True)
        )
        lengths = self._scheduler.lengths(proposals, self._pricing, self._pace(states))
        if self._options is not None and any(offer.confidences is None for offer in offers):
            lengths = tuple(map(_probed, lengths, states, offers))
        return Plan(
            lengths=lengths,
            offers=tuple(offers),
            proposals=proposals,
            draft_s=self._pricing.costs.draft_s(drafted, max(contexts), offers[0].block),
            verify_s=self._pricing.verify_s(lengths, contexts) if any(lengths) else plain_s,
            plain_s=plain_s,
        )

    def plain(self, contexts: Sequence[int]) -> Plan:
        """The plan of a round in which nobody drafts.

        Args:
            contexts: cached tokens of each request.
        """
        nothing = (0,) * len(contexts)
        seconds = self._pricing.verify_s(nothing, contexts)
        return Plan(nothing, (), (), 0.0, seconds, seconds)

    def record(self, states: Sequence[SequenceState], plan: Plan, accepted: Sequence[int]) -> int:
        """Learn from a round.

        Args:
            states: of the group's requests, as given to `plan`.
            plan: the round's.
            accepted: draft tokens of each request that were accepted.

        Returns:
            How many rounds the same group may rest now: decode plainly, without a decision or a look at the clock.
            What comes of it is the same plan; `rested` is told afterwards.
        """
        options = self._options
        if not plan.proposals:
            return self._pass(states, 1)
        if self._short is not None:
            self._judge_block(states, plan, self._short)
        self._count(states, 1)
        size = len(states).bit_length()
        known = self._evidence_of(len(states))
        for state, offer, round_, proposal, length, count in zip(
            states,
            plan.offers,
            round_evidence(plan, accepted, self._overhead_s),
            plan.proposals,
            plan.lengths,
            accepted,
            strict=True,
        ):
            if offer.drafted:
                confidences = offer.confidences and offer.confidences[: offer.drafted]
                self._acceptance.observe(confidences, length, count)
                state.history.observe(proposal.survivals, confidences, length, count)
                known = known.add(round_, _ENGINE_MEMORY)
                if options is None:
                    state.parking = Parking(state.parking.evidence.add(round_, ParkingOptions().memory), 1)
                    continue
                before = state.parking
                state.parking = before.after_drafted_round(round_, options)
                most, change = options.most_allowance, before.allowance_change(round_, options)
                self._allowance = max(min(self._allowance + change, most), -most)
            elif options is not None and state.parking.parked:
                state.parking = state.parking.after_parked_rounds(1, options)
        self._evidence[size] = known
        return 0

    def rested(self, states: Sequence[SequenceState], rounds: int) -> None:
        """So many rounds have passed without a decision, at most as many as `record` allowed."""
        self._pass(states, rounds)

    def _count(self, states: Sequence[SequenceState], rounds: int) -> None:
        """Rounds of these have passed: they earn probes, and a look at plain decoding."""
        self._rounds_since_check += rounds
        if self._options is not None:
            hope = min(self._evidence_of(len(states)).gain ** _HOPE, _MOST_HOPE)
            earned = self._options.probe_share * hope * len(states) * rounds
            self._allowance = min(self._allowance + earned, self._options.most_allowance)

    def _pass(self, states: Sequence[SequenceState], rounds: int) -> int:
        """Rounds in which nobody drafted; how many more may be passed in the same way."""
        self._count(states, rounds)
        options = self._options
        if options is None:
            return 0
        rest = _MOST_REST
        for state in states:
            parking = state.parking
            if parking.parked:
                parking = state.parking = parking.after_parked_rounds(rounds, options)
                rest = min(rest, parking.remaining)
            elif not parking.probing:  # it has paused for a look at plain decoding
                rest = 0
        return rest

    def _evidence_of(self, group: int) -> Evidence:
        """Whether drafting pays in groups of about this size: what recent rounds say, or a calibration."""
        size = group.bit_length()
        found = self._evidence.get(size)
        if found is None:
            found = self._evidence[size] = self._forecast(group)
        return found

    def _forecast(self, group: int) -> Evidence:
        """What the calibration lets expect, if one sequence of the group drafts or all do."""
        conditionals = self._conditionals
        if conditionals is None:
            return NOTHING_KNOWN
        contexts = [0] * group
        plain_s = self._pricing.verify_s([0] * group, contexts)

        def of(drafters: int, block: int | None = None) -> Evidence:
            prices = [
                self._pricing.verify_s([length] * drafters + [0] * (group - drafters), contexts)
                for length in range((block or self._block_size) + 1)
            ]
            each = group / drafters  # every second costs the whole group
            return forecast_evidence(
                conditionals[: len(prices) - 1],
                [plain_s + (price - plain_s) * each for price in prices],
                (self._pricing.costs.draft_s(drafters, 0, block) + self._overhead_s) * each,
            )

        found = [of(drafters) for drafters in {1, group}]
        if self._short is not None:
            found.append(of(1, self._short))
        return max(found, key=lambda evidence: evidence.gain)

    def _judge_block(self, states: Sequence[SequenceState], plan: Plan, short: int) -> None:
        """Learn from a single sequence's drafted round whether a whole block pays.

        By what its chances promised, not by what became of it: three more tokens now and then are mostly luck. Chances
        that promise too much are trusted less, by outcomes.
        """
        offer = plan.offers[0]
        if offer.block is not None:
            self._whole_blocks.passed()
            return
        length = plan.lengths[0]
        tokens = sum(plan.proposals[0].survivals[short:length])
        seconds = self._pricing.costs.draft_s(1, offer.context, None) - self._pricing.costs.draft_s(
            1, offer.context, short
        )
        if length > short:
            seconds += plan.verify_s - self._pricing.verify_s((short,), (offer.context,))
        self._whole_blocks.observe(tokens - seconds * self._pace(states) / plan.plain_s)

    def _pace(self, states: Sequence[SequenceState]) -> float:
        """Speed-up over plain decoding of recent rounds: the mean over the group, where a parked one has 1."""
        total = 0.0
        for state in states:
            parking = state.parking
            gain = 1.0 if parking.parked else parking.evidence.gain
            total += gain if gain > 1.0 else 1.0
        return total / len(states)

    def _plain_is_doubtful(self, contexts: Sequence[int]) -> bool:
        if self._target_doubt is None or self._rounds_since_check < _ROUNDS_BETWEEN_CHECKS:
            return False
        if self._target_doubt(*self._pricing.plain_call(contexts)) < _DOUBT:
            return False
        self._rounds_since_check = 0
        return True


def _probed(length: int, state: SequenceState, offer: Offer) -> int:
    """A drafter without confidences is judged by outcomes alone, so its probes verify one token at least."""
    if length == 0 and offer.drafted and offer.confidences is None and state.parking.probing:
        return 1
    return length
