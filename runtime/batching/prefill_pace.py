"""How many tokens of a prompt are read between two rounds of those who decode.

A chunk is read while every stream waits. What a chunk of a size costs, and what a round does, differs by a factor of a
hundred between devices, so neither can be a constant: both are observed, and the largest size is taken that lengthens
a round by no more than `stall` rounds. A size that was never seen is tried when the next smaller one leaves room for
it. With the default, a token that waits for a chunk comes after two and a half rounds, and a long prompt is read in
about half of the time.

Where nobody decodes, chunks are as large as they may be. Pure numbers; no clock comes in here.
"""

from __future__ import annotations

from collections import deque
from statistics import median

__all__ = ["PrefillPace", "chunk_sizes"]

_SMALLEST = 8
_ROUNDS, _CHUNKS = 16, 5  # whose median is taken
_TRIALS = 2  # a size's first call is bound, and slow: it is judged by two
_ROOM = 0.75  # of what is allowed: a size that takes less leaves room for the next, which takes less than twice as long


def chunk_sizes(most: int) -> tuple[int, ...]:
    """What chunks are made of while others decode: powers of two from 8, and the largest; rising."""
    sizes = []
    size = _SMALLEST
    while size < most:
        sizes.append(size)
        size *= 2
    return (*sizes, most)


class PrefillPace:
    """Chooses chunks by what was observed.

    Args:
        most: tokens of the largest chunk.
        stall: by how much a chunk may lengthen a round, in rounds; None: chunks are always the largest.
    """

    def __init__(self, most: int, stall: float | None = 1.5) -> None:
        self._sizes, self._stall = chunk_sizes(most), stall
        self._rounds: deque[float] = deque(maxlen=_ROUNDS)
        self._chunks: dict[int, deque[float]] = {size: deque(maxlen=_CHUNKS) for size in self._sizes}  # seconds

    def chunk(self, decoding: bool) -> int:
        """Tokens of the next chunk.

        Args:
            decoding: whether somebody waits for its end.
        """
        if self._stall is None or not decoding:
            return self._sizes[-1]
        if not self._rounds:
            return self._sizes[0]
        allowed = self._stall * median(self._rounds)
        chosen, room = self._sizes[0], True
        for size in self._sizes:
            times = self._chunks[size]
            if len(times) < _TRIALS:
                if room:
                    chosen = size
                break
            seconds = median(times)
            if seconds > allowed:
                break
            chosen, room = size, seconds <= _ROOM * allowed
        return chosen

    def observe_round(self, seconds: float) -> None:
        """A round of those who decode took so long, without a chunk."""
        self._rounds.append(seconds)

    def observe_chunk(self, size: int, seconds: float) -> None:
        """A chunk took so long. What is left at a prompt's end has any size, and teaches nothing."""
        if size in self._chunks:
            self._chunks[size].append(seconds)
