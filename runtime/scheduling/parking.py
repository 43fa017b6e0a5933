"""Parking: a drafter that does not pay is not run.

Scheduling can only choose how much of a draft to verify; the draft itself has been paid for by then. Where the target
says what the drafter does not foresee, even the best lengths lose the time of drafting, and the way out is to decode
plainly for a while.

**Does drafting pay?** Of every drafted round two numbers are kept: the tokens it is expected to commit, 1 + Σ a_k over
what is verified, and the tokens that plain decoding would have made in its time, drafting included (its *plain
tokens*). Their sums over recent rounds give the **gain**: tokens a second while drafting by those of plain decoding.
The lengths are the scheduler's own, so the gain knows what the costs are.

**When to park.** Rounds differ: where the mean pays, most rounds may not, and a few pay for all. So a round is not
judged by itself, nor by a mean of few. What each round won or lost, tokens − (1 + margin) · plain tokens, goes into a
**bank**, which holds `most_bank` at most; a sequence parks when it is empty (Page's cumulative sum, 1954). Drafting
that pays keeps the bank full, and drafting that does not can lose no more than it won, plus its probes.

**When to look again.** A probe is a drafted round: if its confidences do not pay, nothing is verified, and it costs a
plain step and a draft. After a probe that does not pay the wait doubles, from `first_wait` to `longest_wait` rounds;
one that pays ends the parking with what it won in the bank. Every round that pays halves the wait, so that a lucky
probe does not start the search over while a lasting change does.

With the defaults a hopeless answer of 128 tokens is drafted for in rounds 0, 3, 8, 17, 34 and 67: six drafts. At 0.35
plain steps each that is 1.6 %.

**What probes may cost.** Waits count rounds, but a draft costs 0.1 plain tokens on one machine and one whole on
another, where drafts for a group are made one after the other and hold up all of it. So an engine has an **allowance**
for the probes of all its sequences, in plain tokens: `probe_share` of what it decodes (less where drafting has lost
lately and a probe finds less, more where it has gained), `most_allowance` saved at most.
A probe takes what it loses. One that costs more than is left waits until it can be paid; so short answers in large
groups are not probed each on its own. A new sequence's first rounds are probes, too, until it has won something: what
they lose is paid from the allowance, so that a run of hopeless short answers does not lose a stake and the probes each.
What a sequence wins is in its bank, to be lost again; only what the bank has no room for goes to the allowance. (Were
a lucky probe's win in both, it would be lost twice: groups of two in fp32 lost 3 % on code so.)

**A new sequence** starts with a stake in its bank if the engine's recent rounds paid, the larger the more they did, and
parked if they did not, or if the allowance owes as much; if nothing is known it asks for a probe, which decides. One
that loses its stake at once waits `start_wait` rounds for the first probe: that others pay says little of it then.

Lossless at temperature > 0: whether a round is drafted depends on earlier rounds only.

Everything is a number and a pure function; the states are values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dspark_edge.engines.errors import InvalidInputError

__all__ = ["NOTHING_KNOWN", "Evidence", "Parking", "ParkingOptions", "forecast_evidence", "start"]


@dataclass(frozen=True, slots=True)
class ParkingOptions:
    """When to park and how long.

    Raises:
        InvalidInputError: a number is out of range.
    """

    margin: float = 0.02  # drafting must gain more than this share
    memory: float = 0.9  # what is left of evidence after another round
    most_bank: float = 3.0  # plain tokens that drafting may lose before it parks, however much it won before
    stake: float = 1.0  # the same of a new sequence, where drafting gains `sure_gain` for the engine's others, or more
    sure_gain: float = 0.2  # share by which it does; where it gains less, the stake is so much smaller
    first_wait: int = 2  # rounds parked before the first probe
    longest_wait: int = 64
    start_wait: int = 8  # rounds before the first probe of a sequence that starts parked, or has won nothing yet
    probe_share: float = 0.01  # of the tokens that an engine decodes, what probes may cost where drafting just pays
    most_allowance: float = 1.0  # plain tokens of it that are saved; what a new engine has

    def __post_init__(self) -> None:
        if self.margin < 0 or not 0 <= self.memory < 1:
            raise InvalidInputError(
                f"margin is {self.margin}, memory {self.memory}; expected a margin ≥ 0 and a memory in [0, 1)"
            )
        if not 0 < self.stake <= self.most_bank:
            raise InvalidInputError(
                f"stake is {self.stake}, most_bank {self.most_bank}; expected a stake above 0 and at most the bank"
            )
        if not self.sure_gain > 0:
            raise InvalidInputError(f"sure_gain is {self.sure_gain}, expected a share above 0")
        if self.probe_share < 0 or self.most_allowance < 0:
            raise InvalidInputError(
                f"probe_share is {self.probe_share}, most_allowance {self.most_allowance}; expected at least 0"
            )
        if not 1 <= self.first_wait <= self.start_wait <= self.longest_wait:
            raise InvalidInputError(
                f"the waits are {self.first_wait}, {self.start_wait} and {self.longest_wait} rounds (first, start, "
                "longest), expected at least 1 and none longer than the next"
            )


# Both are made anew in every round; a frozen dataclass would take three times as long to make.


class Evidence(NamedTuple):
    """Sums over recent drafted rounds, older ones fading."""

    tokens: float  # expected to be committed
    plain_tokens: float  # that plain decoding makes in the same time

    @property
    def gain(self) -> float:
        """Tokens a second by those of plain decoding; 1 where nothing is known."""
        return self.tokens / self.plain_tokens if self.plain_tokens > 0 else 1.0

    @property
    def known(self) -> bool:
        return self.plain_tokens > 0

    def add(self, round_: Evidence, memory: float) -> Evidence:
        """With one more round, after `memory` of the rest is left."""
        return Evidence(self.tokens * memory + round_.tokens, self.plain_tokens * memory + round_.plain_tokens)

    def won(self, options: ParkingOptions) -> float:
        """Plain tokens that drafting has gained beyond its margin; negative: lost."""
        return self.tokens - (1 + options.margin) * self.plain_tokens

    def fade(self, memory: float) -> Evidence:
        return Evidence(self.tokens * memory, self.plain_tokens * memory)

    def pays(self, options: ParkingOptions) -> bool:
        return self.gain > 1 + options.margin


NOTHING_KNOWN = Evidence(0.0, 0.0)


class Parking(NamedTuple):
    """The state of one sequence."""

    evidence: Evidence
    wait: int  # rounds of the next parking
    remaining: int = 0  # parked rounds that are left; 0: draft
    probing: bool = False  # the next drafted round decides whether parking goes on
    bank: float = 0.0  # plain tokens that drafting has won lately and may lose again

    @property
    def parked(self) -> bool:
        return self.remaining > 0

    @property
    def asks(self) -> bool:
        """Whether it waits for a probe to be paid."""
        return self.probing and self.remaining == 0

    def after_parked_rounds(self, rounds: int, options: ParkingOptions) -> Parking:
        """The state after rounds without a draft, by choice."""
        faded = self.evidence.fade(options.memory**rounds)
        return Parking(faded, self.wait, max(self.remaining - rounds, 0), self.probing, self.bank)

    def after_drafted_round(self, round_: Evidence, options: ParkingOptions) -> Parking:
        """The state after a round with a draft.

        Args:
            round_: that round's tokens and plain tokens.
        """
        evidence = self.evidence.add(round_, options.memory)
        won = round_.won(options)
        bank = min(self.bank + won, options.most_bank)
        if bank <= 0:
            return Parking(evidence, min(2 * self.wait, options.longest_wait), self.wait, True)
        wait = max(options.first_wait, self.wait // 2) if won > 0 else self.wait
        return Parking(evidence, wait, bank=bank)

    def allowance_change(self, round_: Evidence, options: ParkingOptions) -> float:
        """What a round with a draft takes from the engine's allowance, or brings to it, plain tokens.

        Args:
            round_: that round's tokens and plain tokens.
        """
        won = round_.won(options)
        if won > 0:
            return max(self.bank + won - options.most_bank, 0.0)
        unproven = self.probing or self.wait >= options.start_wait  # has just started, or won little since
        return won if unproven else 0.0


def start(engine: Evidence, options: ParkingOptions, debt: float = 0.0) -> Parking:
    """The state of a new sequence.

    Args:
        engine: of the engine's recent rounds, or of a forecast.
        debt: plain tokens that earlier probes have lost beyond what they may; at least 0.
    """
    if not engine.known:
        return Parking(NOTHING_KNOWN, options.first_wait, probing=True)
    prior = Evidence(engine.gain, 1.0)
    stake = options.stake * min((engine.gain - 1) / options.sure_gain, 1.0) - debt
    if engine.pays(options) and stake > 0:
        # Should it lose the stake before it has won anything, it is not looked at again soon. Rounds that pay halve it.
        return Parking(prior, options.start_wait, bank=stake)
    wait = min(2 * options.start_wait, options.longest_wait)
    return Parking(prior, wait, options.start_wait, True)


def forecast_evidence(
    conditionals: Sequence[float], verify_s: Sequence[float], draft_s: float, weight: float = 1.0
) -> Evidence:
    """What mean conditional acceptances (of a calibration, for instance) let expect of drafting.

    The best fixed length is taken; confidences that tell good rounds from bad ones gain more.

    Args:
        conditionals: [γ] chance of each position, given that those before it were accepted.
        verify_s: [γ + 1] seconds of target and acceptance at verify length 0 … γ, of one request.
        draft_s: seconds of a draft.
        weight: how many rounds it counts for.
    """
    tokens, survival = 1.0, 1.0
    best = Evidence(1.0, 1 + draft_s / verify_s[0])
    for conditional, seconds in zip(conditionals, verify_s[1:], strict=True):
        survival *= conditional
        tokens += survival
        found = Evidence(tokens, (seconds + draft_s) / verify_s[0])
        if found.gain > best.gain:
            best = found
    return Evidence(best.tokens * weight, best.plain_tokens * weight)
