"""An executor without weights: what it says is written down, and it notices caches in wrong slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dspark_edge.engines.errors import EngineError
from dspark_edge.runtime.batching import BatchGenerator, BatchOptions, GroupScheduling
from dspark_edge.runtime.batching.drafting import CallObserver
from dspark_edge.runtime.batching.grouping import DenseGrouping, Grouping
from dspark_edge.runtime.encoding import PromptEncoder
from dspark_edge.runtime.round import NO_DRAFT, Draft, Request, Verdict
from dspark_edge.runtime.scheduling import Costs, Pricing

from ..scripted import scripted_next

VOCABULARY = 50


def script_answer(prompt: Sequence[int], length: int) -> tuple[int, ...]:
    """What the scripted target says, token by token."""
    token_ids = list(prompt)
    for _ in range(length):
        token_ids.append(scripted_next(token_ids))
    return tuple(token_ids[len(prompt) :])


@dataclass
class ScriptedExecutor:
    """Greedy acceptance against a script. Each slot holds the tokens that were run in it."""

    capacity: int = 1000
    block_size: int = 5
    right: int = 3  # draft tokens that are
    grouping: Grouping = field(default_factory=DenseGrouping)
    failing: Callable[[str], bool] = lambda call: False
    confidence: Callable[[Request], float] | None = None
    calls: list[tuple[str, int]] = field(default_factory=list)  # ("prefill", tokens), ("verify", requests)
    closed: int = 0
    slots: dict[int, list[int]] = field(default_factory=dict)
    lengths: list[tuple[int, ...]] = field(default_factory=list)  # verify lengths of each round

    def pricing(self, costs: Costs) -> Pricing:
        return self.grouping.pricing(costs)

    def observe(self, observer: CallObserver | None) -> None:
        """What calls take here is of no interest."""

    def prefill(self, slot: int, request: Request, count: int) -> Verdict | None:
        self._called("prefill", count)
        sequence = request.sequence
        start = sequence.cache_length
        self._check_cached(slot, request)
        self.slots[slot] = sequence.token_ids[: start + count]
        sequence.cache_length = start + count
        if sequence.cache_length < len(sequence.token_ids):
            return None
        return Verdict(0, scripted_next(sequence.token_ids), (0.0,))

    def draft(self, requests: Sequence[Request], drafting: Sequence[bool]) -> list[Draft]:
        self._called("draft", sum(drafting))
        return [self._draft(one) if wanted else NO_DRAFT for one, wanted in zip(requests, drafting, strict=True)]

    def verify(self, requests: Sequence[Request], drafts: Sequence[Draft], lengths: Sequence[int]) -> list[Verdict]:
        self._called("verify", len(requests))
        self.lengths.append(tuple(lengths))
        verdicts = []
        for slot, (request, draft, length) in enumerate(zip(requests, drafts, lengths, strict=True)):
            self._check_cached(slot, request)
            prefix = list(request.sequence.token_ids)
            if request.sequence.cache_length != len(prefix) - 1 or len(prefix) + length > self.capacity:
                raise AssertionError("the sequence is not cached up to its anchor, or the round passes the capacity")
            self.slots[slot] = [*prefix, *draft.token_ids[:length]]
            accepted = 0
            for token in draft.token_ids[:length]:
                if token != scripted_next(prefix):
                    break
                prefix.append(token)
                accepted += 1
            verdicts.append(Verdict(accepted, scripted_next(prefix), (0.0,) * (accepted + 1)))
        return verdicts

    def exchange(self, one: int, other: int, lengths: tuple[int, int]) -> None:
        first, second = self.slots.get(one, [])[: lengths[0]], self.slots.get(other, [])[: lengths[1]]
        self.slots[one], self.slots[other] = second, first

    def close(self) -> None:
        self.closed += 1

    def _called(self, kind: str, size: int) -> None:
        self.calls.append((kind, size))
        if self.failing(kind):
            raise EngineError(f"{kind}: the backend failed")

    def _check_cached(self, slot: int, request: Request) -> None:
        length = request.sequence.cache_length
        if self.slots.get(slot, [])[:length] != request.sequence.token_ids[:length]:
            raise AssertionError(f"slot {slot} does not hold the request's cache")

    def _draft(self, request: Request) -> Draft:
        prefix = list(request.sequence.token_ids)
        token_ids = []
        for step in range(self.block_size):
            token = scripted_next(prefix)
            token_ids.append(token if step < self.right else (token + 1) % VOCABULARY)
            prefix.append(token_ids[-1])
        confidences = None if self.confidence is None else (self.confidence(request),) * self.block_size
        return Draft(tuple(token_ids), None, None, confidences)


def make_generator(
    executor: ScriptedExecutor, costs: Costs | None = None, eos: Sequence[int] = (), **options: object
) -> BatchGenerator:
    """A batch generator on a scripted executor; scheduled where there are costs."""
    mode = {"mode": "scheduled"} if costs is not None else {}
    policy = GroupScheduling(costs, executor.pricing, executor.block_size) if costs is not None else None
    encoder = PromptEncoder(VOCABULARY, frozenset(eos))
    return BatchGenerator(executor, encoder, BatchOptions(**mode, **options), policy)  # type: ignore[arg-type]
