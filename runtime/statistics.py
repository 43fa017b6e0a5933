"""What a generation cost, in numbers."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from dspark_edge.runtime.round import Round

__all__ = ["EngineStatistics", "EngineTally", "Rates", "Statistics", "Tally"]

_SECONDS = ("prefill_s", "decode_s", "draft_s", "verify_s", "schedule_s", "parked_s", "predicted_s", "plain_s")
_LATEST = 4096  # steps that a running median looks back on


class Rates:
    """What follows from the counts and times of rounds, of one request or of many."""

    __slots__ = ()

    rounds: int
    draft_tokens: int
    drafted_rounds: int
    accepted_by_position: tuple[int, ...]
    draft_s: float
    verify_s: float
    schedule_s: float
    parked_s: float
    plain_s: float | None

    @property
    def committed_tokens(self) -> int:
        """Tokens that rounds committed, the target's own included; what was cut at a request's end, too."""
        raise NotImplementedError

    @property
    def mean_accepted_length(self) -> float:
        """τ: committed tokens a round; 0 without rounds."""
        return self.committed_tokens / self.rounds if self.rounds else 0.0

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


@dataclass(frozen=True, slots=True)
class Statistics(Rates):
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
    def committed_tokens(self) -> int:
        return sum(self.accepted_lengths)

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
        errors = sorted(error for one in rounds if (error := _prediction_error(one)) is not None)
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
            verify_length_counts=_row(lengths),
            accepted_by_position=_row(accepted),
            parked_s=sum(one.draft_s + one.verify_s for one in rounds if not one.drafted),
            predicted_s=sum(one.draft_s + one.verify_s for _, one in predicted) if known else None,
            prediction_error=errors[len(errors) // 2] if errors else None,
            plain_s=sum(expected.plain_s * one.accepted_length for one, expected in predicted) if known else None,
        )


@dataclass(frozen=True, slots=True)
class EngineStatistics(Rates):
    """Counts and times of all requests of a generator together. Seconds are those of the engine: what several requests
    share counts once."""

    requests: int  # that have ended
    prompt_tokens: int  # of these
    new_tokens: int  # of these
    steps: int  # rounds of all requests that were decoding then
    rounds: int  # of single requests
    committed: int
    draft_tokens: int
    drafted_rounds: int
    verify_length_counts: tuple[int, ...]
    accepted_by_position: tuple[int, ...]
    prefill_s: float
    decode_s: float  # of the steps, the host's work included
    draft_s: float
    verify_s: float
    schedule_s: float
    parked_s: float  # of steps without any draft
    predicted_s: float | None  # of the steps' drafts and verifications; None: nothing is known of costs
    prediction_error: float | None  # median over the latest steps of |predicted / observed − 1|
    plain_s: float | None  # what plain decoding would have taken for the same tokens, by the profile

    @property
    def committed_tokens(self) -> int:
        return self.committed

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together, while they decode; 0 before the first step."""
        return self.committed / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def mean_concurrency(self) -> float:
        """Requests a step; 0 before the first one."""
        return self.rounds / self.steps if self.steps else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "mean_accepted_length": self.mean_accepted_length,
            "tokens_per_second": self.tokens_per_second,
            "mean_concurrency": self.mean_concurrency,
            "parked_share": self.parked_share,
            "speedup": self.speedup,
            **self.metrics(),
        }


class EngineTally:
    """Counts what an engine does, for as long as it runs: memory does not grow with the rounds."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._seconds: dict[str, float] = dict.fromkeys(_SECONDS, 0.0)
        self._lengths: Counter[int] = Counter()
        self._accepted: Counter[int] = Counter()
        self._errors: deque[float] = deque(maxlen=_LATEST)

    def add_prefill(self, seconds: float) -> None:
        """A chunk of a prompt."""
        self._seconds["prefill_s"] += seconds

    def add_step(self, records: Sequence[Round], seconds: float) -> None:
        """The rounds of requests that were decoded together, each with the times of them all; not empty."""
        first, counts, sums = records[0], self._counts, self._seconds
        committed = sum(one.accepted_length for one in records)
        counts.update(
            steps=1,
            rounds=len(records),
            committed=committed,
            draft_tokens=sum(one.verify_length for one in records),
            drafted_rounds=sum(one.drafted > 0 for one in records),
            known=first.prediction is not None,
        )
        self._lengths.update(one.verify_length for one in records)
        self._accepted.update(position for one in records for position in range(one.accepted_length - 1))
        observed = first.draft_s + first.verify_s
        sums["decode_s"] += seconds
        sums["draft_s"] += first.draft_s
        sums["verify_s"] += first.verify_s
        sums["schedule_s"] += first.schedule_s
        if not any(one.drafted for one in records):
            sums["parked_s"] += observed
        if first.prediction is not None:
            sums["predicted_s"] += first.prediction.draft_s + first.prediction.verify_s
            sums["plain_s"] += first.prediction.plain_s * committed / len(records)
        if (error := _prediction_error(first)) is not None:
            self._errors.append(error)

    def end_request(self, prompt_tokens: int, new_tokens: int) -> None:
        """A request has its answer, or as much of it as it wanted."""
        self._counts.update(requests=1, prompt_tokens=prompt_tokens, new_tokens=new_tokens)

    def result(self) -> EngineStatistics:
        """As it stands now."""
        counts, sums = self._counts, self._seconds
        known = 0 < counts["steps"] == counts["known"]
        names = ("requests", "prompt_tokens", "new_tokens", "steps", "rounds", "committed", "draft_tokens")
        return EngineStatistics(
            **{name: counts[name] for name in (*names, "drafted_rounds")},
            verify_length_counts=_row(self._lengths),
            accepted_by_position=_row(self._accepted),
            prefill_s=sums["prefill_s"],
            decode_s=sums["decode_s"],
            draft_s=sums["draft_s"],
            verify_s=sums["verify_s"],
            schedule_s=sums["schedule_s"],
            parked_s=sums["parked_s"],
            predicted_s=sums["predicted_s"] if known else None,
            plain_s=sums["plain_s"] if known else None,
            prediction_error=median(self._errors) if self._errors else None,
        )


def _prediction_error(record: Round) -> float | None:
    """|predicted / observed − 1| of draft and verification; None where there is nothing to compare."""
    expected, observed = record.prediction, record.draft_s + record.verify_s
    if expected is None or observed <= 0:
        return None
    return abs((expected.draft_s + expected.verify_s) / observed - 1)


def _row(counts: Counter[int]) -> tuple[int, ...]:
    """Counts of 0, 1, 2 … up to the highest there is."""
    return tuple(counts[index] for index in range(max(counts, default=-1) + 1))
