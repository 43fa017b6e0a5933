"""Drafts for several slots: by a drafter's graph, or by prompt lookup."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

import numpy as np

from dspark_edge.engines.engine import Buffer, Call, Engine, sized
from dspark_edge.runtime.batching.slots import SlotCaches
from dspark_edge.runtime.batching.windows import row_window
from dspark_edge.runtime.calibration import Calibration, Scaling
from dspark_edge.runtime.ngram import NgramIndex
from dspark_edge.runtime.round import NO_DRAFT, Candidates, Draft, Request
from dspark_edge.runtime.sequence import Sequence as TokenSequence

__all__ = ["CallObserver", "GraphDrafter", "LookupDrafter", "SlotDrafter"]


class CallObserver(Protocol):
    """Is told what calls took; `CorrectedCosts` is one."""

    def observe_draft(self, batch: int, context: int, seconds: float) -> None:
        """A drafter call for `batch` sequences of at most `context` cached tokens."""

    def observe_verification(self, batch: int, width: int, context: int, seconds: float) -> None:
        """A target call and its acceptance."""


class SlotDrafter(Protocol):
    """Drafts for the requests in slots 0 … n − 1."""

    @property
    def candidates(self) -> Candidates:
        """[slots, γ, …] where the drafts of each slot lie for the sampler."""

    def draft(
        self, requests: Sequence[Request], drafting: Sequence[bool], observer: CallObserver | None
    ) -> list[Draft]:
        """A draft for each request; `NO_DRAFT` where it is not drafting, or there is nothing to propose."""


class GraphDrafter:
    """A trained drafter's graph.

    Args:
        engine: executes the graph.
        caches: of all slots.
        slots: sequences.
        together: whether one call may draft for several: then one call spans all slots from the first that drafts to
            the last, and runs along for those in between; from slot 0 where the engine has no window that begins
            within its outputs.
        packed: whether a call for several is one of the packed graph.
        calibration: what makes chances of the confidence logits; None takes the logits at their word.
    """

    def __init__(
        self,
        engine: Engine,
        caches: SlotCaches,
        slots: int,
        together: bool,
        packed: bool,
        calibration: Calibration | None,
    ) -> None:
        manifest = engine.bundle.manifest
        facts = manifest.drafter
        self._engine, self._caches, self._together = engine, caches, together
        graph = manifest.graphs["drafter"]  # whose buffers a packed one has, too, for as many as are there
        self._limit, self._block_size = manifest.limits.capacity, facts.block_size
        self._num_candidates = facts.candidates
        self._calibration, self._uncalibrated = calibration, Scaling.identity(facts.block_size)
        self._buffers: dict[str, Buffer] = {}
        for spec in (*graph.inputs, *graph.outputs):
            # base_logits are for inspection; what is not bound is not delivered
            if not caches.holds(spec.name) and spec.name not in graph.aliases and spec.name != "base_logits":
                self._buffers[spec.name] = engine.allocate(spec.dtype, sized(spec, {"batch": slots}))
        self._candidates = Candidates(
            *(self._buffers[name] for name in ("draft_ids", "candidate_ids", "candidate_probs"))
        )
        # Of a packed call's sequences: 0 for those that are not there, whose caches are short.
        self._packed_lengths = engine.allocate("int64", (manifest.packed_sequences,)) if packed else None
        self._slots = slots
        self._noise = np.zeros(self._buffers["noise"].shape, np.float32)  # what the buffer has
        self._calls: dict[tuple[int, int], Call] = {}
        self._version = caches.version
        for count in (1, slots) if packed else (1,):
            self._bind(0, count)  # loads its graph

    @property
    def candidates(self) -> Candidates:
        return self._candidates

    def draft(
        self, requests: Sequence[Request], drafting: Sequence[bool], observer: CallObserver | None
    ) -> list[Draft]:
        starts = [request.sequence.cache_length for request in requests]
        last = self._limit - self._block_size  # behind it the block's own keys and values have no room
        ready = [
            slot for slot, (wanted, start) in enumerate(zip(drafting, starts, strict=True)) if wanted and start <= last
        ]
        drafts = [NO_DRAFT] * len(requests)
        if not ready:
            return drafts
        # Who runs along at the end of its cache has drafted for the last time: what becomes of it is of no interest.
        positions = [min(start, last) for start in starts]
        spans = self._spans(ready)
        for first, count in spans:
            self._caches.ensure(max(positions[first : first + count]) + self._block_size)
        self._write(requests, positions, ready)
        calls = self._calls_now()
        for first, count in spans:
            known = calls.get((first, count))
            call = known or self._bind(first, count)
            if (lengths := self._packed_lengths_of(count)) is not None:
                lengths.write([*positions[first : first + count], *[0] * (lengths.shape[0] - count)])
            started = perf_counter()
            call.run()
            self._engine.synchronize()
            if observer is not None and known is not None:  # a first run takes longer than others
                context = max(positions[first : first + count])
                observer.observe_draft(count, context, perf_counter() - started)
        ids, logits = self._buffers["draft_ids"].read(), self._buffers.get("confidence_logits")
        confidence_logits = None if logits is None else logits.read()
        for slot in ready:
            row = None if confidence_logits is None else tuple(confidence_logits[slot].tolist())
            drafts[slot] = self._result(requests[slot], tuple(ids[slot].tolist()), row)
        return drafts

    def _result(self, request: Request, token_ids: tuple[int, ...], logits: tuple[float, ...] | None) -> Draft:
        confidences = None
        if logits is not None:
            scaling = self._calibration.at(request.params.temperature) if self._calibration else self._uncalibrated
            confidences = scaling.confidences(logits)
        return Draft(token_ids, logits, self._candidates, confidences)

    def _spans(self, ready: Sequence[int]) -> list[tuple[int, int]]:
        """(first slot, slots) of each call."""
        if not self._together:
            return [(slot, 1) for slot in ready]
        first = ready[0] if self._engine.alignment == 1 else 0
        return [(first, ready[-1] - first + 1)]

    def _write(self, requests: Sequence[Request], positions: Sequence[int], ready: Sequence[int]) -> None:
        """Fill the inputs; only those who draft draw random numbers."""
        buffers, idle = self._buffers, [0] * (self._slots - len(requests))
        buffers["anchor_ids"].write([*(request.sequence.anchor for request in requests), *idle])
        buffers["cache_lengths"].write([*positions, *idle])
        temperatures = [request.params.temperature for request in requests]
        buffers["temperature"].write([*temperatures, *idle])
        changed = False
        for slot in ready:
            if temperatures[slot] > 0:
                self._noise[slot] = requests[slot].random.gumbels(1, self._block_size, self._num_candidates)[0]
                changed = True
            elif self._noise[slot].any():
                self._noise[slot] = 0.0
                changed = True
        if changed:
            buffers["noise"].write(self._noise)

    def _calls_now(self) -> dict[tuple[int, int], Call]:
        if self._version != self._caches.version:
            self._calls.clear()
            self._version = self._caches.version
        return self._calls

    def _packed_lengths_of(self, count: int) -> Buffer | None:
        """The lengths that a call for so many sequences takes, if it is one of the packed graph."""
        return self._packed_lengths if count > 1 else None

    def _bind(self, first: int, count: int) -> Call:
        buffers = {name: row_window(self._engine, buffer, first, count) for name, buffer in self._buffers.items()}
        role = "drafter"
        if (lengths := self._packed_lengths_of(count)) is not None:
            buffers["cache_lengths"], role = lengths, "drafter_packed"
        caches = self._caches.rows(self._engine.bundle.manifest.graphs[role], first, count)
        call = self._engine.bind(role, {**buffers, **caches})
        self._calls_now()[first, count] = call
        return call


class LookupDrafter:
    """Prompt lookup for every slot; see `NgramDrafter`.

    Args:
        engine: allocates what the sampler reads.
        slots: sequences.
        block_size: most tokens of a draft.
        smallest, largest: sizes of the runs that are looked up.
    """

    def __init__(self, engine: Engine, slots: int, block_size: int, smallest: int = 2, largest: int = 4) -> None:
        self._block_size, self._smallest, self._largest = block_size, smallest, largest
        self._candidates = Candidates(
            engine.allocate("int64", (slots, block_size)),
            engine.allocate("int64", (slots, block_size, 1)),
            engine.allocate("float32", (slots, block_size, 1)),
        )
        self._candidates.candidate_probs.write(1.0)
        self._drafts = np.zeros((slots, block_size), np.int64)  # what the candidates have
        self._indices: dict[int, tuple[TokenSequence, NgramIndex]] = {}  # by identity of the sequence, which is kept

    @property
    def candidates(self) -> Candidates:
        return self._candidates

    def draft(
        self, requests: Sequence[Request], drafting: Sequence[bool], observer: CallObserver | None
    ) -> list[Draft]:
        started = perf_counter()
        sequences = [request.sequence for request in requests]
        self._indices = {
            id(sequence): self._indices.get(id(sequence)) or (sequence, NgramIndex(self._smallest, self._largest))
            for sequence in sequences
        }
        drafts = [
            self._look_up(slot, sequence) if wanted else NO_DRAFT
            for slot, (sequence, wanted) in enumerate(zip(sequences, drafting, strict=True))
        ]
        if any(draft.token_ids for draft in drafts):
            self._candidates.draft_ids.write(self._drafts)
            self._candidates.candidate_ids.write(self._drafts[..., None])
        if observer is not None and any(drafting):
            longest = max(sequence.cache_length for sequence in sequences)
            observer.observe_draft(sum(drafting), longest, perf_counter() - started)
        return drafts

    def _look_up(self, slot: int, sequence: TokenSequence) -> Draft:
        _, index = self._indices[id(sequence)]
        index.extend(sequence.token_ids)
        token_ids = index.continuation(sequence.token_ids, self._block_size)
        if not token_ids:
            return NO_DRAFT
        self._drafts[slot] = [*token_ids, *[0] * (self._block_size - len(token_ids))]
        return Draft(token_ids, None, self._candidates)
