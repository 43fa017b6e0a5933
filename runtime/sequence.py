"""The state of one sequence: ids and counts, never arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dspark_edge.engines.errors import InvalidInputError

__all__ = ["Sequence"]


@dataclass(slots=True)
class Sequence:
    """Tokens of a request and how many of them the caches hold.

    While decoding, all tokens but the last are cached; the last is the anchor of the next round.
    """

    token_ids: list[int]  # prompt and what was committed
    prompt_length: int
    cache_length: int = 0  # leading tokens whose keys and values are valid
    log_probs: list[float] = field(default_factory=list)  # of the committed tokens, under the target

    @property
    def anchor(self) -> int:
        """The last committed token."""
        return self.token_ids[-1]

    @property
    def new_ids(self) -> list[int]:
        return self.token_ids[self.prompt_length :]

    @property
    def num_new(self) -> int:
        return len(self.token_ids) - self.prompt_length

    def commit(self, token_ids: Iterable[int], log_probs: Iterable[float]) -> None:
        """Append tokens whose predecessors, the anchor included, have just been cached."""
        self.token_ids.extend(token_ids)
        self.log_probs.extend(log_probs)
        self.cache_length = len(self.token_ids) - 1

    def rollback_to(self, length: int) -> None:
        """Keep `length` tokens; the caches' slots behind them count as free.

        Raises:
            InvalidInputError: the length is negative, or more than there are tokens.
        """
        if not 0 <= length <= len(self.token_ids):
            raise InvalidInputError(f"cannot roll back to {length} tokens, there are {len(self.token_ids)}")
        del self.token_ids[length:]
        del self.log_probs[max(length - self.prompt_length, 0) :]
        self.prompt_length = min(self.prompt_length, length)
        self.cache_length = min(self.cache_length, length)
