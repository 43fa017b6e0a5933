"""What a generation cost, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from dspark_edge.runtime.round import Round

__all__ = ["Statistics", "Tally"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts and times of one generation. Times are of our own work only: a slow reader of a stream costs nothing."""

    prompt_tokens: int
    cached_prompt_tokens: int  # of these, found in the caches of the turn before
    new_tokens: int
    rounds: int  # behind the first token, which the prefill gives
    accepted_lengths: tuple[int, ...]  # committed tokens a round, the target's own included; the last is not cut
    draft_tokens: int  # drafts that were sent to verification
    time_to_first_token_s: float
    tokens_per_second: float  # of the tokens behind the first
    draft_s: float
    verify_s: float  # target and acceptance
    host_s: float  # the rest: bookkeeping, text

    @property
    def mean_accepted_length(self) -> float:
        """τ: committed tokens a round; 0 without rounds."""
        return sum(self.accepted_lengths) / self.rounds if self.rounds else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean_accepted_length": self.mean_accepted_length}


@dataclass(slots=True)
class Tally:
    """Collects a generation's rounds and times."""

    prompt_tokens: int
    cached_prompt_tokens: int
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0  # everything behind the first token
    draft_s: float = 0.0
    verify_s: float = 0.0
    draft_tokens: int = 0
    accepted_lengths: list[int] = field(default_factory=list)

    def add(self, record: Round) -> None:
        self.accepted_lengths.append(record.accepted_length)
        self.draft_tokens += record.verify_length
        self.draft_s += record.draft_s
        self.verify_s += record.verify_s

    def result(self, new_tokens: int) -> Statistics:
        following = max(new_tokens - 1, 0)
        return Statistics(
            prompt_tokens=self.prompt_tokens,
            cached_prompt_tokens=self.cached_prompt_tokens,
            new_tokens=new_tokens,
            rounds=len(self.accepted_lengths),
            accepted_lengths=tuple(self.accepted_lengths),
            draft_tokens=self.draft_tokens,
            time_to_first_token_s=self.time_to_first_token_s,
            tokens_per_second=following / self.decode_s if self.decode_s > 0 else 0.0,
            draft_s=self.draft_s,
            verify_s=self.verify_s,
            host_s=max(self.decode_s - self.draft_s - self.verify_s, 0.0),
        )
