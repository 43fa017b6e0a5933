"""Which target calls verify a round's requests: pure functions on numbers.

Requests lie in neighbouring slots 0 … n − 1, and a call takes a range of them. Four groupings:

- **dense**, for the `onnx` and `decomposed` lowerings: one call, as wide as the widest request. Narrower requests are
  padded; what is written behind their tokens is overwritten later.
- **serial**, for the `ort` lowering, whose attention takes a batch at width 1 only: those that verify nothing share one
  call of width 1, every other request has a call of its own.
- **packed**, for bundles of the `ort` lowering that have graphs for it: one call over exactly the tokens that exist;
  where nobody verifies anything, or there is one request, it is serial: that is what the other graphs do best.
- **single**, for bit-exact decoding in any lowering: a call for each request, all of one width, since a batch is
  another shape and has other kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

from dspark_edge.runtime.batching.pricing import SerialDrafts, Shared
from dspark_edge.runtime.scheduling import Costs, Dense, FixedWidth, Packed, Pricing
from dspark_edge.runtime.scheduling.pricing import mean_context

__all__ = ["DenseGrouping", "Grouping", "PackedGrouping", "SerialGrouping", "SingleGrouping", "TargetCall", "runs"]


@dataclass(frozen=True, slots=True)
class TargetCall:
    """One call of the target."""

    first: int  # slot
    widths: tuple[int, ...]  # tokens of it and of the slots behind it; all the same but in packed calls
    judged: tuple[int, ...]  # the slots whose verdict comes from this call; it merely runs over the others
    packed: bool = False  # whether it is one of the packed graph

    def bucket(self, contexts: Sequence[int]) -> tuple[int, int, int]:
        """Batch, width and context that the pricing takes it for.

        Args:
            contexts: cached tokens of each of its sequences.
        """
        if self.packed:
            return 1, sum(self.widths), mean_context(contexts)
        return len(self.widths), self.widths[0], max(contexts)


class Grouping(Protocol):
    """How an engine decodes several requests."""

    @property
    def packed(self) -> bool:
        """Whether there are calls of the packed graphs."""

    @property
    def drafts_together(self) -> bool:
        """Whether one drafter call may draft for several requests."""

    @property
    def width(self) -> int | None:
        """Tokens of every call; None: as many as its requests need."""

    def calls(self, lengths: Sequence[int], rooms: Sequence[int]) -> tuple[TargetCall, ...]:
        """The calls of a round, in order. Each request is judged in one of them.

        Args:
            lengths: verify length of the request in each slot.
            rooms: cache slots behind each request's anchor; at least its length.
        """

    def pricing(self, costs: Costs) -> Pricing:
        """The same in seconds."""


@dataclass(frozen=True, slots=True)
class DenseGrouping:
    """One call, batch × widest.

    A request whose cache ends within the call's width cannot be padded to it. Its neighbours shall not be narrower for
    that, or what they draw would depend on it: it is verified in a call of its own.
    """

    packed = False
    drafts_together = True
    width = None

    def calls(self, lengths: Sequence[int], rooms: Sequence[int]) -> tuple[TargetCall, ...]:
        return tuple(_padded(range(len(lengths)), lengths, rooms))

    def pricing(self, costs: Costs) -> Pricing:
        return Dense(costs)


@dataclass(frozen=True, slots=True)
class SerialGrouping:
    """A call each, and one at width 1 for all that verify nothing.

    The shared call spans all slots from the first to the last of them. The others in between run along, because their
    anchors cost less than a second call would; their own calls come behind it and write the same slots again.
    """

    packed = False
    drafts_together = False
    width = None

    def calls(self, lengths: Sequence[int], rooms: Sequence[int]) -> tuple[TargetCall, ...]:
        plain = tuple(slot for slot, length in enumerate(lengths) if length == 0)
        alone = (TargetCall(slot, (1 + length,), (slot,)) for slot, length in enumerate(lengths) if length > 0)
        if not plain:
            return tuple(alone)
        return (TargetCall(plain[0], (1,) * (plain[-1] - plain[0] + 1), plain), *alone)

    def pricing(self, costs: Costs) -> Pricing:
        return Shared(costs)


@dataclass(frozen=True, slots=True)
class PackedGrouping:
    """One call over the Σ(1 + ℓ) tokens that exist.

    The packed graphs call attention once for each sequence that they were made for. So they are left to the rounds that
    need them, and a group that drafting does not pay for loses nothing by them.
    """

    packed = True
    drafts_together = True
    width = None

    def calls(self, lengths: Sequence[int], rooms: Sequence[int]) -> tuple[TargetCall, ...]:
        packed = len(lengths) > 1 and any(lengths)
        return (TargetCall(0, tuple(1 + length for length in lengths), tuple(range(len(lengths))), packed),)

    def pricing(self, costs: Costs) -> Pricing:
        return Packed(costs)


@dataclass(frozen=True, slots=True)
class SingleGrouping:
    """A call each, all of one width, plain steps included.

    What a request is told is then what it is told alone. So is its draft: at temperature > 0 an answer depends on it.
    """

    width: int  # W, tokens of every call; each request has room for so many

    @property
    def packed(self) -> bool:
        return False

    @property
    def drafts_together(self) -> bool:
        return False

    def calls(self, lengths: Sequence[int], rooms: Sequence[int]) -> tuple[TargetCall, ...]:
        return tuple(TargetCall(slot, (self.width,), (slot,)) for slot in range(len(lengths)))

    def pricing(self, costs: Costs) -> Pricing:
        return FixedWidth(SerialDrafts(costs), self.width)


def runs(slots: Sequence[int], kinds: Sequence[object]) -> Iterator[tuple[int, int]]:
    """(first, count) of the longest ranges of neighbouring slots of one kind.

    Args:
        slots: rising.
        kinds: of each of them.
    """
    places = enumerate(zip(slots, kinds, strict=True))
    for _, group in groupby(places, key=lambda place: (place[1][0] - place[0], place[1][1])):
        taken = [slot for _, (slot, _) in group]
        yield taken[0], len(taken)


def _padded(slots: range, lengths: Sequence[int], rooms: Sequence[int]) -> Iterator[TargetCall]:
    """One call for the slots; where some have too little room for its width, one for each run of such or others."""
    widest = max(lengths[slot] for slot in slots)
    tight = [rooms[slot] < widest for slot in slots]
    if not any(tight):
        yield TargetCall(slots[0], (1 + widest,) * len(slots), tuple(slots))
        return
    # A run of tight slots is narrower than this one (no length exceeds its room), so this comes to an end.
    for first, count in runs(slots, tight):
        yield from _padded(range(first, first + count), lengths, rooms)
