"""The target's calls over ranges of slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_edge.engines.engine import Buffer, Call, Engine
from dspark_edge.runtime.batching.prefill_pace import chunk_sizes
from dspark_edge.runtime.batching.slots import SlotCaches
from dspark_edge.runtime.model import prefill_width

__all__ = ["TargetCalls"]

_Key = tuple[int, int, int, int]  # first slot, slots, width, rows that get logits


@dataclass(frozen=True, slots=True)
class _Bound:
    """The target bound for one range of slots and one width."""

    call: Call
    input_ids: Buffer  # [B, W]
    cache_lengths: Buffer  # [B]
    logit_rows: Buffer  # [B, N]
    logits: Buffer  # [B, N, V]


class TargetCalls:
    """Binds the target for what is called, and keeps what is likely to be called again.

    All calls leave their logits at the beginning of one buffer: they are judged before the next call runs.

    Args:
        engine: executes the graph.
        caches: of all slots.
        slots: sequences.
        prefill_chunk: width of the widest prefill calls.
    """

    def __init__(self, engine: Engine, caches: SlotCaches, slots: int, prefill_chunk: int) -> None:
        manifest = engine.bundle.manifest
        self._engine, self._caches = engine, caches
        self._graph = manifest.graphs["target"]
        self._vocabulary = manifest.target.vocab_size
        self._most, self._limit = prefill_chunk, manifest.limits.capacity
        self._widest, self._chunks = manifest.drafter.block_size + 1, chunk_sizes(prefill_chunk)
        self._logits = engine.allocate("float32", (slots, self._widest, self._vocabulary))
        self._calls: dict[_Key, _Bound] = {}
        self._version = caches.version
        self.bindings = 0  # made so far: a call that makes one takes longer than others
        self._bind((0, 1, 1, 1))  # loads the graph here, so that neither its time nor its errors fall on a request

    def prefill(self, slot: int, token_ids: Sequence[int], start: int) -> Buffer:
        """Cache some of a prompt's tokens behind the `start` that are cached, with logits for the last of them.

        Returns:
            [1, 1, V] float32 logits; valid until the next run.
        """
        # What is written behind the chunk is overwritten, as rejected drafts are.
        count = len(token_ids)
        padding = [0] * (prefill_width(self._engine, count, self._most, self._limit - start) - count)
        bound = self._bound(slot, [[*token_ids, *padding]], [start], rows=1)
        if self._engine.few_shapes:
            bound.logit_rows.write(count - 1)
        bound.call.run()
        return bound.logits

    def run(self, first: int, token_ids: Sequence[Sequence[int]], starts: Sequence[int], rows: int) -> Buffer:
        """Run tokens behind what is cached of each sequence.

        Args:
            first: slot of the first sequence; the others are in the slots behind it.
            token_ids: [B][W] of each sequence.
            starts: [B] valid cache slots of each.
            rows: how many of the W tokens, the last ones, get logits.

        Returns:
            [B, rows, V] float32 logits; valid until the next run.
        """
        bound = self._bound(first, token_ids, starts, rows)
        bound.call.run()
        return bound.logits

    def _bound(self, first: int, token_ids: Sequence[Sequence[int]], starts: Sequence[int], rows: int) -> _Bound:
        """The call for these tokens, which are in its inputs."""
        width = len(token_ids[0])
        self._caches.ensure(max(starts) + width)
        if self._version != self._caches.version:
            self._calls.clear()
            self._version = self._caches.version
        key = (first, len(token_ids), width, rows)
        bound = self._calls.get(key) or self._bind(key)
        bound.input_ids.write(token_ids)
        bound.cache_lengths.write(starts)
        return bound

    def _bind(self, key: _Key) -> _Bound:
        first, count, width, rows = key
        self.bindings += 1
        allocate = self._engine.allocate
        logit_rows = allocate("int64", (count, rows))
        logit_rows.write(np.arange(width - rows, width))
        input_ids, cache_lengths = allocate("int64", (count, width)), allocate("int64", (count,))
        logits = self._engine.window(self._logits, (count, rows, self._vocabulary))
        buffers = {
            "input_ids": input_ids,
            "cache_lengths": cache_lengths,
            "logit_rows": logit_rows,
            "logits": logits,
            **self._caches.rows(self._graph, first, count),
        }
        bound = _Bound(self._engine.bind("target", buffers), input_ids, cache_lengths, logit_rows, logits)
        if (
            width <= self._widest or width in self._chunks or self._engine.few_shapes
        ):  # a prompt's last chunk has any width: not kept
            self._calls[key] = bound
        return bound
