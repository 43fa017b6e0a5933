"""A round's decision for a group: what each sequence offers, what is verified of it, and what that says of drafting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dspark_edge.runtime.scheduling.ladder import Proposal
from dspark_edge.runtime.scheduling.parking import Evidence

__all__ = ["Offer", "Plan", "round_evidence"]

# What a round has brought is partly what its confidences promised, which varies less than what became of it. More of
# the outcome is counted, so that a drafter that promises too much parks before the trust in it has fallen; with all of
# it, one that gains little is parked by chance.
_OUTCOME_SHARE = 0.6


class Offer(NamedTuple):
    """What a sequence brings to a round."""

    drafted: int  # tokens of its draft that could be verified: at most the draft and the room behind the anchor
    confidences: tuple[float, ...] | None  # calibrated and conditional, at least `drafted`; None: the drafter has none
    context: int  # cached tokens
    greedy: bool  # temperature 0
    block: int | None = None  # tokens that the drafter was run for; None: of a whole block


class Plan(NamedTuple):
    """A group's decision for one round."""

    lengths: tuple[int, ...]  # verify length of each request
    offers: tuple[Offer, ...]  # of each request; none where nothing was drafted
    proposals: tuple[Proposal, ...]  # the same
    draft_s: float  # predicted, of the drafter
    verify_s: float  # predicted, of target and acceptance
    plain_s: float  # predicted, had nothing been verified


def round_evidence(plan: Plan, accepted: Sequence[int], overhead_s: float = 0.0) -> tuple[Evidence, ...]:
    """Whether drafting paid, request by request; (1, 1) where nothing was drafted.

    The time beyond a plain step is divided among those who drafted: drafting in equal parts, verification in
    proportion to what each is expected to get of it, since a hopeless request does not make a call wider. Summed over
    the group, the plain tokens are those that plain decoding makes in the round's time.

    Args:
        plan: the round's.
        accepted: draft tokens of each request that were accepted; all that counts where a drafter has no confidences.
        overhead_s: of deciding and learning, which counts as drafting.
    """
    claims = [sum(one.survivals[:length]) for one, length in zip(plan.proposals, plan.lengths, strict=True)]
    gains = [
        float(count) if offer.confidences is None else claim + _OUTCOME_SHARE * (count - claim)
        for offer, claim, count in zip(plan.offers, claims, accepted, strict=True)
    ]
    drafted, claimed = sum(offer.drafted > 0 for offer in plan.offers), sum(claims)
    by_second = len(plan.offers) / plan.plain_s  # tokens of plain decoding
    draft = (plan.draft_s + overhead_s) * by_second / drafted if drafted else 0.0
    wider = (plan.verify_s - plan.plain_s) * by_second
    return tuple(
        Evidence(1 + gain, 1 + draft + (wider * claim / claimed if claimed else 0.0))
        if offer.drafted
        else Evidence(1.0, 1.0)
        for offer, gain, claim in zip(plan.offers, gains, claims, strict=True)
    )
