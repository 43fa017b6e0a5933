"""Acceptance for ranges of slots: the sampler graphs, each for the requests that ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_edge.engines.engine import Buffer, Engine, sized
from dspark_edge.runtime import model
from dspark_edge.runtime.batching.grouping import runs
from dspark_edge.runtime.batching.windows import InputRows
from dspark_edge.runtime.round import Candidates, Request, Verdict

__all__ = ["Judge"]


@dataclass(frozen=True, slots=True)
class _Key:
    """What a sampler is bound for."""

    role: str
    slot: int  # the first
    count: int  # slots
    row: int  # of the call's logits where the first slot's begin
    rows: int  # N, logits of each slot
    drafted: bool  # whether there is anything to judge


class Judge:
    """Applies the acceptance rule to the logits of a call.

    Requests are judged together where neighbours ask for the same graph: greedy, drawing or filtered.

    Args:
        engine: executes the graphs.
        slots: sequences.
        logits: [rows, V] where the target leaves what is to be judged, one sequence's rows behind the other's.
        candidates: where the drafter leaves what it drafted for each slot; None without a drafter.
    """

    def __init__(self, engine: Engine, slots: int, logits: Buffer, candidates: Candidates | None) -> None:
        self._engine, self._logits = engine, logits
        # For calls that judge no draft, which then need not read a whole block's candidates.
        self._nothing = Candidates(
            engine.allocate("int64", (slots, 1)),
            engine.allocate("int64", (slots, 1, 1)),
            engine.allocate("float32", (slots, 1, 1)),
        )
        self._candidates = candidates or self._nothing
        self._samplers: dict[_Key, _Sampler] = {}

    @property
    def bindings(self) -> int:
        """Samplers bound so far: a call that binds one takes longer than others."""
        return len(self._samplers)

    def accept(
        self,
        first: int,
        widths: Sequence[int],
        judged: Sequence[int],
        requests: Sequence[Request],
        lengths: Sequence[int],
    ) -> list[Verdict]:
        """Verdicts on requests of one target call, in the order of `judged`.

        Args:
            first: the call's first slot.
            widths: rows of logits of it and of the slots behind it.
            judged: slots that are to be judged, rising.
            requests: of those slots; draw from their streams of random numbers.
            lengths: verify length of each, below its rows.
        """
        verdicts: list[Verdict] = []
        kinds = [
            (request.params.sampler_role, widths[slot - first]) for slot, request in zip(judged, requests, strict=True)
        ]
        for slot, count in runs(judged, kinds):
            begin = len(verdicts)
            of_run, of_lengths = requests[begin : begin + count], lengths[begin : begin + count]
            role, rows = kinds[begin]
            key = _Key(role, slot, count, sum(widths[: slot - first]), rows, any(of_lengths))
            sampler = self._samplers.get(key)
            if sampler is None:
                candidates = self._candidates if key.drafted else self._nothing
                sampler = self._samplers[key] = _Sampler(self._engine, key, self._logits, candidates)
            verdicts += sampler.accept(of_run, of_lengths)
        return verdicts


class _Sampler:
    """A sampler graph bound to a range of a call's logits and to its slots' candidates."""

    def __init__(self, engine: Engine, key: _Key, logits: Buffer, candidates: Candidates) -> None:
        graph = engine.bundle.manifest.graphs[key.role]
        sources = {"logits": (logits, key.row, (key.count, key.rows, *logits.shape[1:]))}
        for name in ("draft_ids", "candidate_ids", "candidate_probs"):
            of_slots: Buffer = getattr(candidates, name)
            sources[name] = (of_slots, key.slot, (key.count, *of_slots.shape[1:]))
        sizes = {"batch": key.count, "rows": key.rows}
        self._buffers: dict[str, Buffer] = {}
        self._given: list[InputRows] = []
        for spec in (*graph.inputs, *graph.outputs):
            if spec.name in sources:  # of which the greedy graph takes some alone
                rows = InputRows(engine, *sources[spec.name])
                self._given.append(rows)
                self._buffers[spec.name] = rows.buffer
            else:
                self._buffers[spec.name] = engine.allocate(spec.dtype, sized(spec, sizes))
        self._call = engine.bind(key.role, self._buffers)
        self._shape = (key.count, key.rows)
        self._vocabulary = logits.shape[1]
        self._drawing = "accept_uniforms" in self._buffers
        self._filtering = "pool" in self._buffers

    def accept(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Verdict]:
        buffers = self._buffers
        for rows in self._given:
            rows.refresh()
        buffers["verify_lengths"].write(lengths)
        if self._drawing:
            self._draw(requests, lengths)
        if self._filtering:
            for name in ("top_k", "top_p", "min_p"):
                buffers[name].write([getattr(request.params, name) for request in requests])
            buffers["pool"].write(min(model._FILTER_POOL, self._vocabulary))
        self._call.run()
        if self._filtering and not buffers["covered"].read().all():
            buffers["pool"].write(self._vocabulary)
            self._call.run()
        accepted = buffers["accepted_lengths"].read().tolist()
        next_ids = buffers["next_ids"].read().tolist()
        log_probs = buffers["log_probs"].read()
        return [
            Verdict(count, next_id, tuple(row[: count + 1].tolist()))
            for count, next_id, row in zip(accepted, next_ids, log_probs, strict=True)
        ]

    def _draw(self, requests: Sequence[Request], lengths: Sequence[int]) -> None:
        """Each request draws as many numbers as it would alone, so that its answer is its own."""
        buffers = self._buffers
        accept, sample = np.zeros(self._shape, np.float32), np.zeros(len(requests), np.float32)
        for row, (request, length) in enumerate(zip(requests, lengths, strict=True)):
            accept[row, : length + 1] = request.random.uniforms(1, length + 1)[0]
            sample[row] = request.random.uniforms(1)[0]
        buffers["temperature"].write([request.params.temperature for request in requests])
        buffers["accept_uniforms"].write(accept)
        buffers["sample_uniforms"].write(sample)
