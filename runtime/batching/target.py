"""The target's calls over ranges of slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from dspark_edge.engines.engine import Buffer, Call, Engine
from dspark_edge.runtime.batching.prefill_pace import chunk_sizes
from dspark_edge.runtime.batching.slots import SlotCaches
from dspark_edge.runtime.model import prefill_width

__all__ = ["PackedTargetCalls", "TargetCalls"]

_Key = tuple[int, int, int, int]  # first slot, slots, tokens of all of them, rows that get logits


@dataclass(frozen=True, slots=True)
class _Bound:
    """The target bound for one range of slots and so many tokens."""

    call: Call
    inputs: dict[str, Buffer]


class TargetCalls:
    """Binds the target for what is called, and keeps what is likely to be called again.

    All calls leave their logits at the beginning of one buffer: they are judged before the next call runs.

    Args:
        engine: executes the graph.
        caches: of all slots.
        slots: sequences.
        prefill_chunk: width of the widest prefill calls.
        logits: where they leave theirs; None: in a buffer of their own.
    """

    _role = "target"

    def __init__(
        self, engine: Engine, caches: SlotCaches, slots: int, prefill_chunk: int, logits: Buffer | None = None
    ) -> None:
        manifest = engine.bundle.manifest
        self._engine, self._caches = engine, caches
        self._graph = manifest.graphs[self._role]
        self._most, self._limit = prefill_chunk, manifest.limits.capacity
        self._widest, self._chunks = manifest.drafter.block_size + 1, chunk_sizes(prefill_chunk)
        if logits is None:
            logits = engine.allocate("float32", (slots * self._widest, manifest.target.vocab_size))
        self._logits = logits
        self._calls: dict[_Key, _Bound] = {}
        self._version = caches.version
        self.bindings = 0  # made so far: a call that makes one takes longer than others
        self._bind((0, 1, 1, 1))  # loads the graph here, so that neither its time nor its errors fall on a request

    @property
    def logits(self) -> Buffer:
        """[slots · (γ + 1), V] float32, of the last call: one sequence's rows behind the other's."""
        return self._logits

    def prefill(self, slot: int, token_ids: Sequence[int], start: int) -> None:
        """Cache some of a prompt's tokens behind the `start` that are cached, with one row of logits for the last."""
        # What is written behind the chunk is overwritten, as rejected drafts are.
        count = len(token_ids)
        padding = [0] * (prefill_width(self._engine, count, self._most, self._limit - start) - count)
        bound = self._bound(slot, [[*token_ids, *padding]], [start], rows=1)
        if self._engine.few_shapes:
            bound.inputs["logit_rows"].write(count - 1)
        bound.call.run()

    def run(self, first: int, token_ids: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        """Run tokens behind what is cached of each sequence, with a row of logits for each.

        Args:
            first: slot of the first sequence; the others are in the slots behind it.
            token_ids: [B][W] of each sequence; as many of all but in packed calls.
            starts: [B] valid cache slots of each.
        """
        self._bound(first, token_ids, starts).call.run()

    def _bound(
        self, first: int, token_ids: Sequence[Sequence[int]], starts: Sequence[int], rows: int | None = None
    ) -> _Bound:
        """The call for these tokens, which are in its inputs; with logits of so many rows, or of all."""
        self._caches.ensure(max(start + len(ids) for start, ids in zip(starts, token_ids, strict=True)))
        if self._version != self._caches.version:
            self._calls.clear()
            self._version = self._caches.version
        tokens = sum(map(len, token_ids))
        key = (first, len(token_ids), tokens, tokens if rows is None else rows)
        bound = self._calls.get(key) or self._bind(key)
        self._write(bound.inputs, token_ids, starts)
        return bound

    def _bind(self, key: _Key) -> _Bound:
        first, count, tokens, rows = key
        self.bindings += 1
        inputs = self._inputs(count, tokens, rows)
        logits = self._engine.window(self._logits, (*inputs["logit_rows"].shape, self._logits.shape[1]))
        caches = self._caches.rows(self._graph, first, count)
        bound = _Bound(self._engine.bind(self._role, {**inputs, "logits": logits, **caches}), inputs)
        width = tokens // count
        # A prompt's last chunk has any width: it is not kept.
        if width <= self._widest or width in self._chunks or self._engine.few_shapes:
            self._calls[key] = bound
        return bound

    def _inputs(self, count: int, tokens: int, rows: int) -> dict[str, Buffer]:
        """Buffers for so many sequences; those that never change are filled in."""
        allocate, width, kept = self._engine.allocate, tokens // count, rows // count
        inputs = {
            "input_ids": allocate("int64", (count, width)),
            "cache_lengths": allocate("int64", (count,)),
            "logit_rows": allocate("int64", (count, kept)),
        }
        inputs["logit_rows"].write(np.arange(width - kept, width))
        return inputs

    def _write(self, inputs: dict[str, Buffer], token_ids: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        inputs["input_ids"].write(token_ids)
        inputs["cache_lengths"].write(starts)


class PackedTargetCalls(TargetCalls):
    """The same of the packed graph: sequences of any widths, in one row of tokens; see `exporter/packing.py`.

    A binding serves all widths that add up to as many tokens.
    """

    _role = "target_packed"

    def _inputs(self, count: int, tokens: int, rows: int) -> dict[str, Buffer]:
        sequences = self._engine.bundle.manifest.packed_sequences
        of_each = {name: self._engine.allocate("int64", (sequences,)) for name in ("cache_lengths", "widths")}
        return {**super()._inputs(1, tokens, rows), **of_each}

    def _write(self, inputs: dict[str, Buffer], token_ids: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        # Of sequences that are not there both are 0: nothing of theirs passes the end of the short cache they have.
        absent = [0] * (inputs["widths"].shape[0] - len(token_ids))
        inputs["input_ids"].write([list(chain.from_iterable(token_ids))])
        inputs["cache_lengths"].write([*starts, *absent])
        inputs["widths"].write([*map(len, token_ids), *absent])
