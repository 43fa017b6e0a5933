"""Prompt lookup: draft what followed the last time the same few tokens were seen.

For targets that have no trained drafter. Costs microseconds, and pays where the answer repeats its prompt or itself.
Source: Saxena, "Prompt Lookup Decoding" (2023).
"""

from __future__ import annotations

import numpy as np

from dspark_edge.engines.engine import Engine
from dspark_edge.runtime.round import NO_DRAFT, Candidates, Draft, Request
from dspark_edge.runtime.sequence import Sequence

__all__ = ["NgramDrafter", "NgramIndex"]


class NgramIndex:
    """Where each run of `smallest` … `largest` tokens was last followed by something.

    Grows with the sequence, one dictionary entry a token and size; committed tokens are never taken back.
    """

    def __init__(self, smallest: int, largest: int) -> None:
        self.smallest, self.largest = smallest, largest
        self._followers: dict[tuple[int, ...], int] = {}  # run → index of the token behind it
        self._indexed = 0  # tokens that are known as followers

    def extend(self, token_ids: list[int]) -> None:
        """Index the tokens that were appended since the last call."""
        for follower in range(max(self._indexed, 1), len(token_ids)):
            for size in range(self.smallest, min(self.largest, follower) + 1):
                self._followers[tuple(token_ids[follower - size : follower])] = follower
        self._indexed = len(token_ids)

    def continuation(self, token_ids: list[int], length: int) -> tuple[int, ...]:
        """Up to `length` tokens that followed the longest known run the tokens end in."""
        for size in range(min(self.largest, len(token_ids)), self.smallest - 1, -1):
            follower = self._followers.get(tuple(token_ids[-size:]))
            if follower is not None:
                return tuple(token_ids[follower : follower + length])
        return ()


class NgramDrafter:
    """Drafts by prompt lookup.

    Its draft is certain (probability 1), so at temperature > 0 a token is accepted with the target's own probability
    of it: lossless, as for any drafter.

    Args:
        engine: allocates what the sampler reads.
        block_size: most tokens of a draft.
        smallest, largest: sizes of the runs that are looked up, the largest first.
    """

    def __init__(self, engine: Engine, block_size: int, smallest: int = 2, largest: int = 4) -> None:
        self._block_size = block_size
        self._smallest, self._largest = smallest, largest
        self._index = NgramIndex(smallest, largest)
        self._sequence: Sequence | None = None
        self._ids = np.zeros((1, block_size), np.int64)
        self._candidates = Candidates(
            engine.allocate("int64", (1, block_size)),
            engine.allocate("int64", (1, block_size, 1)),
            engine.allocate("float32", (1, block_size, 1)),
        )
        self._candidates.candidate_probs.write(1.0)

    @property
    def block_size(self) -> int:
        return self._block_size

    def draft(self, request: Request, length: int) -> Draft:
        sequence = request.sequence
        if sequence is not self._sequence:
            self._sequence, self._index = sequence, NgramIndex(self._smallest, self._largest)
        self._index.extend(sequence.token_ids)
        token_ids = self._index.continuation(sequence.token_ids, self._block_size)
        if not token_ids:
            return NO_DRAFT
        self._ids[0, : len(token_ids)] = token_ids
        self._candidates.draft_ids.write(self._ids)
        self._candidates.candidate_ids.write(self._ids[..., None])
        return Draft(token_ids, None, self._candidates)
