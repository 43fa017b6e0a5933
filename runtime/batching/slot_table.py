"""Who has which slot.

Decoding requests lie in slots 0 … n − 1, because a call takes a range of slots, and every slot in it costs something.
Those whose prompts are being prefilled lie behind them, free slots behind these. When a request leaves, the last one of
its kind takes its slot: its cache is moved, once in an answer, a few milliseconds. Leaving a hole would cost its share
of every round until somebody takes it, and collecting scattered slots for a call would copy all caches every round.
"""

from __future__ import annotations

from collections.abc import Callable

from dspark_edge.runtime.batching.lane import Lane

__all__ = ["SlotTable"]

Exchange = Callable[[int, int, tuple[int, int]], None]


class SlotTable:
    """Lanes by slot.

    Args:
        slots: how many there are.
        exchange: exchanges the caches of two slots, with so many valid tokens each; see `Executor.exchange`.
    """

    def __init__(self, slots: int, exchange: Exchange) -> None:
        self._slots, self._exchange = slots, exchange
        self._lanes: list[Lane] = []  # by slot
        self._decoding = 0

    @property
    def lanes(self) -> tuple[Lane, ...]:
        """All, by slot."""
        return tuple(self._lanes)

    @property
    def decoding(self) -> tuple[Lane, ...]:
        """Those that decode, by slot."""
        return tuple(self._lanes[: self._decoding])

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return self._slots - len(self._lanes)

    def slot_of(self, lane: Lane) -> int:
        return self._lanes.index(lane)

    def admit(self, lane: Lane) -> None:
        """Give a request whose prompt is to be prefilled the first free slot."""
        self._lanes.append(lane)

    def promote(self, lane: Lane) -> None:
        """The request's prompt is cached: it decodes from now on."""
        self._swap(self.slot_of(lane), self._decoding)
        lane.decoding = True
        self._decoding += 1

    def remove(self, lane: Lane) -> None:
        """Free the request's slot."""
        slot = self.slot_of(lane)
        if lane.decoding:
            self._decoding -= 1
            self._swap(slot, self._decoding, leaving=lane)
            slot = self._decoding
        self._swap(slot, len(self._lanes) - 1, leaving=lane)
        self._lanes.pop()

    def _swap(self, one: int, other: int, leaving: Lane | None = None) -> None:
        """Exchange two slots; nothing of the cache of one that is leaving is kept."""
        if one == other:
            return
        lanes = self._lanes
        first, second = (0 if lane is leaving else lane.cache_length for lane in (lanes[one], lanes[other]))
        self._exchange(one, other, (first, second))
        lanes[one], lanes[other] = lanes[other], lanes[one]
