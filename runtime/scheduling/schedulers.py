"""How many draft tokens of each request to verify.

**What is maximised.** A round commits 1 + Σ a_k tokens a request, where the survival a_k is the chance that the first k
drafts are all accepted, and takes the time of drafting and of verifying so many. Over many rounds the tokens a second
are E[tokens] / E[time], the ratio of the means (renewal reward), and not the mean of the rounds' ratios. The policy
that maximises it takes, in every round, the lengths with the largest

    Σ a_k − λ · seconds,    λ: the tokens a second that the best policy reaches

(Dinkelbach 1967). λ is what a second is worth; it does not depend on this round. A rule that maximises each round's own
ratio, as the paper's Algorithm 1, asks too little of a bad round (its ratio is below λ, so seconds look cheap) and too
much of a good one. Seconds of drafting have been spent when lengths are chosen: a constant, and no part of the
choice. Whether they should be spent at all is decided before, in `parking.py`. λ is B · pace / (seconds of a plain
step of B requests), where the pace is the speed-up over plain decoding in recent rounds; so it follows a machine that
becomes slower as soon as the costs do. The objective is flat around the best λ: a rough one is good enough.

**What may be known.** At temperature 0 a draft is a function of the text. Nothing is drawn, so every rule gives the
plain answer. Above, a draft token d_k is drawn, and may be used as a sample of draft_probs only while that is what it
is: *given all that the decision to verify it rests on, d_k must still be distributed as draft_probs*. A rule that looks
at c_{k+1}, which is computed from d_k, drops d_k more often when it is one token than when it is another, and the
answer is biased (the paper's Appendix A). So:

- whether d_k is verified may depend on c_1 … c_k of its own draft (c_k is computed from d_{k−1}) and on earlier rounds;
- in a batch, also on other requests, but there must be **one order** for all: each decision rests only on confidences
  of tokens whose predecessors have been admitted before it. It is not enough that each request ignores its own later
  tokens. Let request 1 verify its draft if that of request 2 is one of some set, and the reverse. Each answer alone is
  right, but P(x_1, x_2) is off by (A_1 − Q_1 p_1)(A_2 − Q_2 p_2), with p the target's probability of the token, Q
  the chance that the draft is in its set, and A that it is and its verification gives the token: the answers of two
  users are correlated.

All rules here climb a ladder (`ladder.py`) from rung 0, and decide on rung k from the gains up to k and from numbers
of earlier rounds. A rung's gain is known when the rungs below it are admitted, and the rungs' order, too: the
likeliest of the requests' next tokens comes next. So the climb itself is the one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from dspark_edge.runtime.scheduling.ladder import Ladder, Proposal
from dspark_edge.runtime.scheduling.pricing import Pricing

__all__ = [
    "EarlyStop",
    "Lagged",
    "LookAhead",
    "Plain",
    "Scheduler",
    "Static",
    "Threshold",
    "admission_thresholds",
    "best_rung",
    "climb",
]

# Below it a forecast is no forecast; keeps slopes finite.
_LEAST_EXPECTED = 1e-9


class Scheduler(Protocol):
    """Chooses verify lengths. A pure function of numbers: whatever a rule remembers is in the proposals."""

    looks_back: ClassVar[bool]
    """Whether it asks for what was live two rounds ago; proposals need not have it otherwise."""

    def lengths(self, proposals: Sequence[Proposal], pricing: Pricing, pace: float) -> tuple[int, ...]:
        """A verify length for each request, at most as many as it has drafts.

        Args:
            proposals: of the group's requests, at least one.
            pricing: how the engine verifies the group.
            pace: tokens a second of recent rounds by those of plain decoding; at least 1.
        """


@dataclass(frozen=True, slots=True)
class Plain:
    """Verify nothing. Lossless: no draft token is used."""

    looks_back: ClassVar[bool] = False

    def lengths(self, proposals: Sequence[Proposal], pricing: Pricing, pace: float) -> tuple[int, ...]:
        return (0,) * len(proposals)


@dataclass(frozen=True, slots=True)
class Static:
    """Verify the same number of tokens always. Lossless at any temperature: the length depends on no token."""

    looks_back: ClassVar[bool] = False

    length: int

    def lengths(self, proposals: Sequence[Proposal], pricing: Pricing, pace: float) -> tuple[int, ...]:
        return tuple(min(self.length, len(one.survivals)) for one in proposals)


@dataclass(frozen=True, slots=True)
class Threshold:
    """Verify while the survival is at least `least`. For diagnosis: it knows no costs.

    Lossless at any temperature: a_k is a product of c_1 … c_k, and other requests are not looked at.
    """

    looks_back: ClassVar[bool] = False

    least: float

    def lengths(self, proposals: Sequence[Proposal], pricing: Pricing, pace: float) -> tuple[int, ...]:
        # Survivals never rise: those at or above the threshold are the first ones.
        return tuple(sum(value >= self.least for value in one.survivals) for one in proposals)


@dataclass(frozen=True, slots=True)
class EarlyStop:
    """The paper's Algorithm 1 (section 3.2.2), on what this engine charges.

    Admits rungs in order while the round's own throughput, Σ(1 + a) / seconds with drafting included, rises; stops at
    the first that does not raise it.

    Lossless at any temperature: a rung is admitted by the gains up to its own. Stopping for good at the first rung
    that does not pay is what makes it so: a step of the costs that later rungs would repay ends the climb, because
    looking at those rungs would be looking at tokens that are being decided on.
    """

    looks_back: ClassVar[bool] = False

    def lengths(self, proposals: Sequence[Proposal], pricing: Pricing, pace: float) -> tuple[int, ...]:
        ladders = pricing.ladders(proposals)
        drafted = sum(bool(one.survivals) for one in proposals)
        seconds = sum(ladder.seconds[0] for ladder in ladders)
        if drafted:
            context = max(one.context for one in proposals)
            seconds += pricing.costs.draft_s(drafted, context, proposals[0].block)
        tokens = float(len(proposals))
        rungs = [0] * len(ladders)
        while True:
            # One ladder but for serial pricing, where the likeliest of the requests' next tokens is next.
            gain, index = max(
                ((ladder.gains[rung], -at) for at, (ladder, rung) in _open(ladders, rungs)), default=(0.0, 0)
            )
            if gain <= 0:
                return _lengths(ladders, rungs, len(proposals))
            ladder, rung = ladders[-index], rungs[-index]
            higher = seconds + ladder.seconds[rung + 1] - ladder.seconds[rung]
            if (tokens + gain) * seconds <= tokens * higher:
                return _lengths(ladders, rungs, len(proposals))
            tokens, seconds, rungs[-index] = tokens + gain, higher, rung + 1


@dataclass(frozen=True, slots=True)
class LookAhead:
    """The default: the best rung where all may be known, and the best expected one where it may not.

    If every request is greedy, the rung with the largest Σ gains − λ · seconds.

    Otherwise an optimal-stopping rule. Costs are staircases, so whether a rung pays is often decided by those behind
    it. Their gains may not be looked at, but can be expected: behind rung k they are the live gain of k times what
    earlier rounds say of the rest, ρ · e_j with ρ = gain_k / e_k. Rung k is admitted if some end m ≥ k is then better
    than stopping below k:

        ρ · (e_k + … + e_m) > λ · (seconds_m − seconds_{k−1})   for some m ≥ k

    At the next rung the question is asked anew, with one more live gain.

    Lossless at any temperature: ρ is all that is live in it. So rung k is admitted if gain_k exceeds a threshold,
    e_k · λ · min_m (seconds_m − seconds_{k−1}) / (e_k + … + e_m), which is made of costs and earlier rounds alone
    (`admission_thresholds`), and the gain is one of confidences up to its position.
    """

    looks_back: ClassVar[bool] = False

    def lengths(self, proposals: Sequence[Proposal], pricing: Pricing, pace: float) -> tuple[int, ...]:
        ladders = pricing.ladders(proposals)
        rate = _rate(ladders, len(proposals), pace)
        if all(one.greedy for one in proposals):
            rungs = [best_rung(ladder.gains, ladder.seconds, rate) for ladder in ladders]
        else:
            rungs = [
                climb(ladder.gains, admission_thresholds(ladder.expected, ladder.seconds, rate)) for ladder in ladders
            ]
        return _lengths(ladders, rungs, len(proposals))


@dataclass(frozen=True, slots=True)
class Lagged:
    """The paper's variant for engines that must know a round's size ahead (section 5.2).

    How many rungs comes from the survivals of two rounds ago: the best rung of a ladder made of them, with no early
    stop. Live confidences only say which tokens fill them: in a packed group the likeliest of all requests', in the
    others there is no choice left, and with one request the length comes wholly from old confidences.

    Lossless at any temperature: two rounds ago all was drawn that these confidences say something of, and the drafts of
    now are drawn anew; so the number of rungs is a constant here, and every rule is allowed to find it. Filling r rungs
    by descending live survival is a climb that stops at a number known before: whether d_k of a request is among
    them depends on its survival a_k and on the other requests' tokens with larger ones, all admitted before it. It
    would not be lossless to fill them by anything that a later token changes, the survival of the whole draft for
    instance, or to drop the requests whose last confidences are worst.
    """

    looks_back: ClassVar[bool] = True

    def lengths(self, proposals: Sequence[Proposal], pricing: Pricing, pace: float) -> tuple[int, ...]:
        past = pricing.ladders([one._replace(survivals=one.lagged) for one in proposals])
        rate = _rate(past, len(proposals), pace)
        rungs = [best_rung(ladder.gains, ladder.seconds, rate) for ladder in past]
        return _lengths(pricing.ladders(proposals), rungs, len(proposals))


def best_rung(gains: Sequence[float], seconds: Sequence[float], rate: float) -> int:
    """The rung with the largest Σ gains − rate · seconds; of equal ones the lowest.

    Args:
        gains: [n] tokens that each rung adds.
        seconds: [n + 1] of stopping at rung 0 … n.
        rate: λ, tokens that a second is worth.
    """
    best, value = 0, 0.0
    most = -rate * seconds[0]
    for rung, (gain, price) in enumerate(zip(gains, seconds[1:], strict=True), start=1):
        value += gain
        if value - rate * price > most:
            best, most = rung, value - rate * price
    return best


def admission_thresholds(expected: Sequence[float], seconds: Sequence[float], rate: float) -> list[float]:
    """The gain that each rung has to exceed to be admitted, see `LookAhead`; from numbers of earlier rounds alone.

    With E_k = e_1 + … + e_k, the cheapest end behind rung j has the least slope from (E_j, seconds_j) to a later
    point: the next corner of the lower convex hull of the points from j on, which a scan from the right keeps on a
    stack. O(n).

    Args:
        expected: [n] gains as forecast; those behind a rung are scaled by its live gain.
        seconds: [n + 1] of stopping at rung 0 … n.
        rate: λ, tokens that a second is worth.
    """
    count = len(expected)
    steps = [max(value, _LEAST_EXPECTED) for value in expected]
    totals = [0.0]
    for step in steps:
        totals.append(totals[-1] + step)
    thresholds = [0.0] * count
    corners = [count]  # of the hull, the leftmost last
    slopes = [float("inf")]  # from each corner to the one right of it
    for rung in range(count - 1, -1, -1):
        while True:
            corner = corners[-1]
            slope = (seconds[corner] - seconds[rung]) / (totals[corner] - totals[rung])
            if slope < slopes[-1]:
                break
            corners.pop()
            slopes.pop()
        corners.append(rung)
        slopes.append(slope)
        thresholds[rung] = rate * steps[rung] * slope
    return thresholds


def climb(gains: Sequence[float], thresholds: Sequence[float]) -> int:
    """Rungs until the first whose gain does not exceed its threshold."""
    rung = 0
    for gain, threshold in zip(gains, thresholds, strict=True):
        if gain <= threshold:
            break
        rung += 1
    return rung


def _rate(ladders: Sequence[Ladder], batch: int, pace: float) -> float:
    """λ: tokens a second at this pace."""
    return pace * batch / sum(ladder.seconds[0] for ladder in ladders)


def _open(ladders: Sequence[Ladder], rungs: Sequence[int]) -> list[tuple[int, tuple[Ladder, int]]]:
    """Ladders that go on, with their index and rung."""
    pairs = enumerate(zip(ladders, rungs, strict=True))
    return [(index, pair) for index, pair in pairs if pair[1] < len(pair[0].gains)]


def _lengths(ladders: Sequence[Ladder], rungs: Sequence[int], batch: int) -> tuple[int, ...]:
    lengths = [0] * batch
    for ladder, rung in zip(ladders, rungs, strict=True):
        ladder.add_lengths(rung, lengths)
    return tuple(lengths)
