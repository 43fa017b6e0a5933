"""A target and drafters without weights: what they say is written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark_edge.runtime.round import Draft, Request, Verdict
from dspark_edge.runtime.sampling import SamplingParams
from dspark_edge.runtime.scheduled_policy import StreamScheduling

Script = Callable[[Sequence[int]], int]


def scripted_next(token_ids: Sequence[int]) -> int:
    """The scripted target's choice: depends on the whole prefix, so that no wrong token goes unnoticed."""
    value = 7
    for token in token_ids:
        value = (value * 31 + token + 1) % 1_000_003
    return value % 50


@dataclass
class ScriptedVerifier:
    """Greedy acceptance against a script; counts what it is asked to run."""

    script: Script = scripted_next
    capacity: int = 1000
    widths: list[int] = field(default_factory=list)

    def verify(self, request: Request, draft: Draft, verify_length: int) -> Verdict:
        prefix = list(request.sequence.token_ids)
        if request.sequence.cache_length != len(prefix) - 1:
            raise AssertionError("the sequence is not cached up to its anchor")
        if request.sequence.cache_length + 1 + verify_length > self.capacity:
            raise AssertionError("the round passes the capacity")
        self.widths.append(1 + verify_length)
        accepted = 0
        for token in draft.token_ids[:verify_length]:
            if token != self.script(prefix):
                break
            prefix.append(token)
            accepted += 1
        return Verdict(accepted, self.script(prefix), (0.0,) * (accepted + 1))


@dataclass
class ScriptedDrafter:
    """Right for `right` tokens, then wrong."""

    right: int
    block_size: int = 5
    script: Script = scripted_next

    def draft(self, request: Request, length: int = 0) -> Draft:
        prefix = list(request.sequence.token_ids)
        token_ids = []
        for step in range(self.block_size):
            token = self.script(prefix)
            token_ids.append(token if step < self.right else (token + 1) % 50)
            prefix.append(token_ids[-1])
        return Draft(tuple(token_ids))


@dataclass(frozen=True)
class TableCosts:
    """Costs by width, whatever the context; a batch costs its multiple."""

    target: tuple[float, ...]  # seconds at width 1, 2, …
    draft: float

    def target_s(self, batch: int, width: int, context: int) -> float:
        return batch * self.target[min(width, len(self.target)) - 1]

    def draft_s(self, batch: int, context: int, block: int | None = None) -> float:
        return batch * self.draft

    def sampler_s(self, batch: int, width: int) -> float:
        return 0.0


class Unobserved(StreamScheduling):
    """Made-up costs, which real times must not correct."""

    def policy(self, params: SamplingParams) -> Any:
        policy = super().policy(params)
        for kind in ("observe_draft", "observe_verification"):
            setattr(policy._costs, kind, lambda *_: None)
        return policy
