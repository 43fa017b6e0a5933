"""What a generation cost, in numbers."""

from __future__ import annotations

from collections import Counter
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
    host_s: float  # the rest: scheduling, bookkeeping, text
    schedule_s: float = 0.0  # of host_s: deciding what to draft and to verify
    drafted_rounds: int = 0  # rounds in which the drafter ran; the others were parked, or had no room
    verify_length_counts: tuple[int, ...] = ()  # rounds by verify length 0, 1, 2 …
    accepted_by_position: tuple[int, ...] = ()  # draft tokens accepted at each position of the block
    parked_s: float = 0.0  # of rounds without a draft
    predicted_s: float | None = None  # of all rounds' drafts and verifications; None: nothing is known of costs
    prediction_error: float | None = None  # median over rounds of |predicted / observed − 1|
    plain_s: float | None = None  # what plain decoding would have taken for the same tokens, by the profile

    @property
    def mean_accepted_length(self) -> float:
        """τ: committed tokens a round; 0 without rounds."""
        return sum(self.accepted_lengths) / self.rounds if self.rounds else 0.0

    @property
    def speedup(self) -> float | None:
        """Against plain decoding at the costs of the profile, as corrected by what was observed; None without one."""
        spent = self.draft_s + self.verify_s + self.schedule_s
        return self.plain_s / spent if self.plain_s is not None and spent > 0 else None

    @property
    def parked_share(self) -> float:
        """Share of the decoding time in rounds without a draft."""
        total = self.draft_s + self.verify_s
        return self.parked_s / total if total > 0 else 0.0

    def metrics(self) -> dict[str, float]:
        """Counters by the names that vLLM gives them."""
        return {
            "spec_decode_num_drafts": self.drafted_rounds,
            "spec_decode_num_draft_tokens": self.draft_tokens,
            "spec_decode_num_accepted_tokens": sum(self.accepted_by_position),
            **{
                f"spec_decode_num_accepted_tokens_per_pos_{position}": count
                for position, count in enumerate(self.accepted_by_position)
            },
        }

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "mean_accepted_length": self.mean_accepted_length,
            "parked_share": self.parked_share,
            "speedup": self.speedup,
            **self.metrics(),
        }


@dataclass(slots=True)
class Tally:
    """Collects a generation's rounds and times."""

    prompt_tokens: int
    cached_prompt_tokens: int
    time_to_first_token_s: float = 0.0
    decode_s: float = 0.0  # everything behind the first token
    rounds: list[Round] = field(default_factory=list)

    def add(self, record: Round) -> None:
        self.rounds.append(record)

    def result(self, new_tokens: int) -> Statistics:
        following, rounds = max(new_tokens - 1, 0), self.rounds
        draft_s, verify_s, schedule_s = (
            sum(getattr(one, name) for one in rounds) for name in ("draft_s", "verify_s", "schedule_s")
        )
        lengths = Counter(one.verify_length for one in rounds)
        accepted = Counter(position for one in rounds for position in range(one.accepted_length - 1))
        predicted = [(one, one.prediction) for one in rounds if one.prediction is not None]
        errors = sorted(
            abs((expected.draft_s + expected.verify_s) / (one.draft_s + one.verify_s) - 1)
            for one, expected in predicted
            if one.draft_s + one.verify_s > 0
        )
        known = len(predicted) == len(rounds) > 0
        return Statistics(
            prompt_tokens=self.prompt_tokens,
            cached_prompt_tokens=self.cached_prompt_tokens,
            new_tokens=new_tokens,
            rounds=len(rounds),
            accepted_lengths=tuple(one.accepted_length for one in rounds),
            draft_tokens=sum(one.verify_length for one in rounds),
            time_to_first_token_s=self.time_to_first_token_s,
            tokens_per_second=following / self.decode_s if self.decode_s > 0 else 0.0,
            draft_s=draft_s,
            verify_s=verify_s,
            host_s=max(self.decode_s - draft_s - verify_s, 0.0),
            schedule_s=schedule_s,
            drafted_rounds=sum(one.drafted > 0 for one in rounds),
            verify_length_counts=tuple(lengths[length] for length in range(max(lengths, default=-1) + 1)),
            accepted_by_position=tuple(accepted[position] for position in range(max(accepted, default=-1) + 1)),
            parked_s=sum(one.draft_s + one.verify_s for one in rounds if not one.drafted),
            predicted_s=sum(one.draft_s + one.verify_s for _, one in predicted) if known else None,
            prediction_error=errors[len(errors) // 2] if errors else None,
            plain_s=sum(expected.plain_s * one.accepted_length for one, expected in predicted) if known else None,
        )
