"""The round: draft, schedule, verify, accept, commit.

Everything here is numbers and ids. A `Verifier` runs the target and the acceptance rule, a `Drafter` proposes; the
engine-backed ones are in `model.py`, scripted ones in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from dspark_edge.engines.engine import Buffer
from dspark_edge.runtime.sampling import RandomStream, SamplingParams
from dspark_edge.runtime.sequence import Sequence

__all__ = [
    "NO_DRAFT",
    "Candidates",
    "Draft",
    "Drafter",
    "FixedLength",
    "Observer",
    "Policy",
    "Prediction",
    "Request",
    "Round",
    "Verdict",
    "Verifier",
    "decode_round",
]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Where a drafter leaves its drafts for the sampler; they stay in the engine's memory."""

    draft_ids: Buffer  # [B, G] int64
    candidate_ids: Buffer  # [B, G, K] int64, distinct in a position
    candidate_probs: Buffer  # [B, G, K] float32, exactly what the drafts were drawn from


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposed tokens after an anchor, at most a block."""

    token_ids: tuple[int, ...]
    confidence_logits: tuple[float, ...] | None = None  # conditional on the drafts before being accepted
    candidates: Candidates | None = None  # None only where there are no tokens, or a scripted verifier needs none
    confidences: tuple[float, ...] | None = None  # the same as calibrated chances in [0, 1], see `Calibration`


NO_DRAFT = Draft(())


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the target says of a draft."""

    accepted_length: int  # draft tokens that stay
    next_id: int  # the target's own token behind them
    log_probs: tuple[float, ...]  # of those accepted_length + 1 tokens, under the target


@dataclass(frozen=True, slots=True)
class Request:
    """A sequence, how it is to be sampled, and its random numbers."""

    sequence: Sequence
    params: SamplingParams
    random: RandomStream


class Drafter(Protocol):
    """Proposes tokens after a sequence's anchor."""

    @property
    def block_size(self) -> int: ...

    def draft(self, request: Request, length: int) -> Draft:
        """At most a block of tokens; none where it has nothing to propose or no room to work in.

        Args:
            length: how many are wanted at least; a drafter that drafts as many for less may stop there.
        """


class Verifier(Protocol):
    """Runs the target over an anchor and its draft, and applies the acceptance rule."""

    @property
    def capacity(self) -> int:
        """Cache slots of a sequence, tokens."""

    def verify(self, request: Request, draft: Draft, verify_length: int) -> Verdict:
        """Judge the first `verify_length` tokens of the draft; caches are written from the anchor's position on."""


class Policy(Protocol):
    """Decides for one request, round by round: whether to draft, and how much of the draft to verify."""

    def draft_length(self, context: int) -> int:
        """How many tokens to draft at least in this round, with `context` tokens cached; 0: the drafter is not run."""

    def verify_length(self, draft: Draft, room: int, context: int) -> int:
        """How many draft tokens to verify: at most the draft and the room behind the anchor."""

    def predicted_s(self) -> Prediction | None:
        """What this round was expected to take; None where nothing is known of costs."""

    def learn(self, record: Round) -> None:
        """What became of the round."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Expected seconds of a round."""

    draft_s: float
    verify_s: float  # target and acceptance
    plain_s: float  # of a round of plain decoding in its place


@dataclass(frozen=True, slots=True)
class FixedLength:
    """Always verify `length` tokens, as far as there are so many (0 is plain decoding).

    Lossless at any temperature: the length depends on no token.
    """

    length: int

    def draft_length(self, context: int) -> int:
        return self.length

    def verify_length(self, draft: Draft, room: int, context: int) -> int:
        return min(self.length, room, len(draft.token_ids))

    def predicted_s(self) -> Prediction | None:
        return None

    def learn(self, record: Round) -> None:
        """Nothing to learn."""


@dataclass(frozen=True, slots=True)
class Round:
    """The record of one round."""

    position: int  # the anchor's
    draft: Draft
    verify_length: int
    accepted_length: int  # committed tokens, the target's own included
    draft_s: float
    verify_s: float
    schedule_s: float = 0.0  # spent on deciding
    prediction: Prediction | None = None

    @property
    def drafted(self) -> int:
        """Tokens the drafter proposed."""
        return len(self.draft.token_ids)


Observer = Callable[[Round], None]
"""Is shown every round that was decoded, outside of what is timed."""


def decode_round(request: Request, verifier: Verifier, drafter: Drafter | None, policy: Policy) -> Round:
    """Decode one round and commit its tokens to the request's sequence.

    Args:
        request: its sequence is cached up to the anchor, and has room for the anchor itself.
        verifier: target and acceptance.
        drafter: None decodes plainly.
        policy: decides whether to draft, and the verify length.
    """
    sequence = request.sequence
    position = sequence.cache_length
    room = verifier.capacity - position - 1  # slots behind the anchor's own

    started = perf_counter()
    length = policy.draft_length(position) if drafter is not None and room > 0 else 0
    decided = perf_counter()
    draft = drafter.draft(request, length) if drafter is not None and length else NO_DRAFT

    drafted = perf_counter()
    verify_length = policy.verify_length(draft, room, position)
    scheduled = perf_counter()
    verdict = verifier.verify(request, draft, verify_length)
    verified = perf_counter()

    accepted = draft.token_ids[: verdict.accepted_length]
    sequence.commit((*accepted, verdict.next_id), verdict.log_probs)
    record = Round(
        position=position,
        draft=draft,
        verify_length=verify_length,
        accepted_length=len(accepted) + 1,
        draft_s=drafted - decided,
        verify_s=verified - scheduled,
        schedule_s=decided - started + scheduled - drafted,
        prediction=policy.predicted_s(),
    )
    policy.learn(record)
    return record
