"""What an engine really charges for the verification of a group of requests.

A target call has one width. So what a draft token costs depends on how the engine makes calls of requests:

- **dense**: one call for the group, padded to its widest request: batch × widest. A token costs something only where it
  makes the call wider; below the widest request they are all free. So rung k gives *every* request its k-th token, and
  there is one decision for the group: the width.
- **serial**: a call for each request, at batch 1. Requests are priced, and so decided, one by one: a ladder each.
- **packed**: one row of tokens, Σ(1 + ℓ) of them, through everything but attention. The price is that of so many tokens
  at batch 1; a rung is one token, and the likeliest come first, whosever they are. Nothing verified, it is dense.
- **fixed width**: a call for each request, always of the same width, for bit-exact decoding. Verification costs what a
  plain step does: all that is left to decide is whether to draft.

For a single request the first three are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol

from dspark_edge.runtime.scheduling.costs import Costs, verification_row
from dspark_edge.runtime.scheduling.ladder import Ladder, Proposal

__all__ = ["Dense", "FixedWidth", "Packed", "Pricing", "Serial", "mean_context"]


class Pricing(Protocol):
    """A way to verify a group, and its price."""

    @property
    def costs(self) -> Costs: ...

    def verify_s(self, lengths: Sequence[int], contexts: Sequence[int]) -> float:
        """Seconds of target and acceptance for requests with these verify lengths and cached tokens."""

    def plain_call(self, contexts: Sequence[int]) -> tuple[int, int, int]:
        """Batch, width and context of a target call where nothing is verified; of the first, if there are several."""

    def ladders(self, proposals: Sequence[Proposal]) -> tuple[Ladder, ...]:
        """The proposals' tokens in order of admission. The ladders' seconds add up to the group's."""


@dataclass(frozen=True, slots=True)
class Dense:
    """One call, batch × widest, with the longest context."""

    costs: Costs

    def verify_s(self, lengths: Sequence[int], contexts: Sequence[int]) -> float:
        return _call_s(self.costs, len(lengths), 1 + max(lengths), max(contexts))

    def plain_call(self, contexts: Sequence[int]) -> tuple[int, int, int]:
        return len(contexts), 1, max(contexts)

    def ladders(self, proposals: Sequence[Proposal]) -> tuple[Ladder, ...]:
        """One; rung k is the k-th token of all requests that have one.

        Below the widest request tokens are free, and a free token can only gain: so no request stays below.
        """
        return (_ladder_of_levels(self.costs, proposals, tuple(range(len(proposals)))),)


@dataclass(frozen=True, slots=True)
class Serial:
    """A call for each request, at batch 1."""

    costs: Costs

    def verify_s(self, lengths: Sequence[int], contexts: Sequence[int]) -> float:
        calls = zip(lengths, contexts, strict=True)
        return sum(_call_s(self.costs, 1, 1 + length, context) for length, context in calls)

    def plain_call(self, contexts: Sequence[int]) -> tuple[int, int, int]:
        return 1, 1, contexts[0]

    def ladders(self, proposals: Sequence[Proposal]) -> tuple[Ladder, ...]:
        """One for each request."""
        return tuple(_ladder_of_levels(self.costs, [one], (index,)) for index, one in enumerate(proposals))


@dataclass(frozen=True, slots=True)
class Packed:
    """One call over the Σ(1 + ℓ) tokens that exist, priced as one sequence of so many with the mean context.

    Projections, which are nearly all of the work, see a row of tokens and do not know whose they are. Attention pays
    for each token's own context, so its sum follows the mean. If nothing is verified, the call is a batch of width 1.
    """

    costs: Costs

    def verify_s(self, lengths: Sequence[int], contexts: Sequence[int]) -> float:
        if not any(lengths):
            return _call_s(self.costs, *self.plain_call(contexts))
        return _call_s(self.costs, 1, len(lengths) + sum(lengths), mean_context(contexts))

    def plain_call(self, contexts: Sequence[int]) -> tuple[int, int, int]:
        return len(contexts), 1, max(contexts)

    def ladders(self, proposals: Sequence[Proposal]) -> tuple[Ladder, ...]:
        """One; a rung is one token, by descending live survival, equal ones by request and position.

        A survival never exceeds that of the position before, so a request's tokens come in their order, and the first
        r rungs are a prefix of each draft.
        """
        pairs = [(-value, index) for index, one in enumerate(proposals) for value in one.survivals]
        pairs.sort()  # equal survivals of one request are interchangeable: only their number matters
        expected = sorted((value for one in proposals for value in one.expected), reverse=True)
        batch, contexts = len(proposals), [one.context for one in proposals]
        verifying = verification_row(self.costs, 1, batch + len(pairs), mean_context(contexts))[batch:]
        return (
            Ladder(
                extends=tuple((index,) for _, index in pairs),
                gains=tuple(-value for value, _ in pairs),
                expected=tuple(expected),
                seconds=(_call_s(self.costs, *self.plain_call(contexts)), *verifying),
            ),
        )


@dataclass(frozen=True, slots=True)
class FixedWidth:
    """A call of `width` tokens for each request, at batch 1, whatever is verified."""

    costs: Costs
    width: int

    def verify_s(self, lengths: Sequence[int], contexts: Sequence[int]) -> float:
        return sum(_call_s(self.costs, 1, self.width, context) for context in contexts)

    def plain_call(self, contexts: Sequence[int]) -> tuple[int, int, int]:
        return 1, self.width, contexts[0]

    def ladders(self, proposals: Sequence[Proposal]) -> tuple[Ladder, ...]:
        """One for each request; all its rungs cost the same, so that whatever may be accepted is verified."""
        return tuple(
            Ladder(
                extends=((index,),) * len(one.survivals),
                gains=one.survivals,
                expected=one.expected,
                seconds=(_call_s(self.costs, 1, self.width, one.context),) * (len(one.survivals) + 1),
            )
            for index, one in enumerate(proposals)
        )


def _call_s(costs: Costs, batch: int, width: int, context: int) -> float:
    return costs.target_s(batch, width, context) + costs.sampler_s(batch, width)


def mean_context(contexts: Sequence[int]) -> int:
    """Cached tokens of a sequence in the mean: what a packed call is priced at."""
    return round(sum(contexts) / len(contexts))


def _ladder_of_levels(costs: Costs, proposals: Sequence[Proposal], indices: Sequence[int]) -> Ladder:
    """Rung k: the k-th token of every request, in one call."""
    levels = max(len(one.survivals) for one in proposals)
    even = all(len(one.survivals) == levels for one in proposals)
    batch, context = len(proposals), max(one.context for one in proposals)
    return Ladder(
        extends=(tuple(indices),) * levels
        if even
        else tuple(
            tuple(index for index, one in zip(indices, proposals, strict=True) if len(one.survivals) > level)
            for level in range(levels)
        ),
        gains=_sums([one.survivals for one in proposals]),
        expected=_sums([one.expected for one in proposals]),
        seconds=tuple(verification_row(costs, batch, 1 + levels, context)),
    )


def _sums(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """By position, over rows of different lengths."""
    return rows[0] if len(rows) == 1 else tuple(map(sum, zip_longest(*rows, fillvalue=0.0)))
