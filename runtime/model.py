"""Target, drafter and sampler of a bundle on an engine, for one sequence at a time.

Calls are bound once per shape and kept; what changes from round to round is a few integers in small buffers. The
target's logits go from graph to graph in the engine's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_edge.engines.engine import Buffer, Call, Engine, sized
from dspark_edge.engines.manifest import GraphSpec, TensorSpec
from dspark_edge.runtime.bit_exact import check_rows, reserved_slots
from dspark_edge.runtime.calibration import Calibration, Scaling
from dspark_edge.runtime.round import NO_DRAFT, Candidates, Draft, Request, Verdict
from dspark_edge.runtime.sampling import RandomStream, SamplingParams

__all__ = ["Caches", "ModelDrafter", "ModelVerifier"]

_CACHE_PREFIXES = ("past_key_values.", "drafter.past.")
# Caches of symbolic capacity start here and double: operators whose cost follows the capacity stay cheap at first.
_FIRST_CAPACITY = 512
# How many likely tokens top-p and top-k sort at first; rarely too few, and then the whole vocabulary is sorted.
_FILTER_POOL = 1024


class Caches:
    """Key/value buffers of target and drafter, updated in place by both graphs.

    Args:
        engine: allocates them.
        limit: most slots a sequence may have; the bundle's capacity.
        sequences: rows of every buffer.
    """

    def __init__(self, engine: Engine, limit: int, sequences: int = 1) -> None:
        graphs = engine.bundle.manifest.graphs
        specs = {
            spec.name: spec
            for role in ("target", "drafter")
            if role in graphs
            for spec in graphs[role].inputs
            if spec.name.startswith(_CACHE_PREFIXES)
        }
        self._engine, self._limit, self._sequences = engine, limit, sequences
        self._specs: Sequence[TensorSpec] = tuple(specs.values())
        self._growing = any("capacity" in spec.shape for spec in self._specs)
        self.version = 0  # changes when buffers do: calls bound to the old ones are void
        self.capacity = min(_FIRST_CAPACITY, limit) if self._growing else limit
        self.buffers = self._allocate(self.capacity)

    def ensure(self, length: int) -> None:
        """Make room for `length` slots (at most the limit), keeping what is cached."""
        if length <= self.capacity or self.capacity == self._limit:
            return
        capacity = self.capacity
        while capacity < length:
            capacity *= 2
        capacity = min(capacity, self._limit)
        grown = self._allocate(capacity)
        for name, buffer in grown.items():
            wider = buffer.read().copy()
            wider[:, :, : self.capacity] = self.buffers[name].read()
            buffer.write(wider)
        self.buffers, self.capacity = grown, capacity
        self.version += 1

    def of(self, graph: GraphSpec) -> dict[str, Buffer]:
        """The buffers that a graph takes."""
        return {spec.name: self.buffers[spec.name] for spec in graph.inputs if spec.name in self.buffers}

    def _allocate(self, capacity: int) -> dict[str, Buffer]:
        sizes = {"batch": self._sequences, "capacity": capacity}
        return {spec.name: self._engine.allocate(spec.dtype, sized(spec, sizes)) for spec in self._specs}


@dataclass(frozen=True, slots=True)
class _TargetCall:
    """The target bound at one width."""

    call: Call
    input_ids: Buffer  # [1, W]
    logit_rows: Buffer  # [1, N]
    logits: Buffer  # [1, N, V]


class _SamplerCall:
    """A sampler graph bound to one logits buffer and one drafter's candidates."""

    def __init__(self, engine: Engine, role: str, logits: Buffer, candidates: Candidates) -> None:
        self._rows = logits.shape[1]
        graph = engine.bundle.manifest.graphs[role]
        given = {
            "logits": logits,
            "draft_ids": candidates.draft_ids,
            "candidate_ids": candidates.candidate_ids,
            "candidate_probs": candidates.candidate_probs,
        }
        sizes = {"batch": 1, "rows": self._rows}
        self._buffers = {
            spec.name: given.get(spec.name) or engine.allocate(spec.dtype, sized(spec, sizes))
            for spec in (*graph.inputs, *graph.outputs)
        }
        self._call = engine.bind(role, self._buffers)
        self.candidates = candidates  # kept, so that no other candidates can come to have their id
        self._vocabulary = logits.shape[2]
        self._drawing = "accept_uniforms" in self._buffers
        self._filtering = "pool" in self._buffers

    def accept(self, verify_length: int, params: SamplingParams, random: RandomStream) -> Verdict:
        buffers = self._buffers
        buffers["verify_lengths"].write(verify_length)
        if self._drawing:
            buffers["temperature"].write(params.temperature)
            # As many as there are drafts to judge, however wide the call is: in a batch as alone.
            accept = np.zeros((1, self._rows), np.float32)
            accept[:, : verify_length + 1] = random.uniforms(1, verify_length + 1)
            buffers["accept_uniforms"].write(accept)
            buffers["sample_uniforms"].write(random.uniforms(1))
        if self._filtering:
            buffers["top_k"].write(params.top_k)
            buffers["top_p"].write(params.top_p)
            buffers["min_p"].write(params.min_p)
            buffers["pool"].write(min(_FILTER_POOL, self._vocabulary))
        self._call.run()
        if self._filtering and not buffers["covered"].read()[0]:
            buffers["pool"].write(self._vocabulary)
            self._call.run()
        accepted = int(buffers["accepted_lengths"].read()[0])
        log_probs = buffers["log_probs"].read()[0, : accepted + 1].tolist()
        return Verdict(accepted, int(buffers["next_ids"].read()[0]), tuple(log_probs))


def prefill_width(engine: Engine, count: int, most: int, room: int) -> int:
    """Tokens of a call that caches `count` of a prompt: a power of two where the engine wants few shapes.

    Args:
        most: of a call.
        room: cache slots behind what is cached.
    """
    if not engine.few_shapes:
        return count
    width = min(1 << (count - 1).bit_length(), most)
    return width if width <= room else count


class ModelVerifier:
    """The target graph with the sampler behind it.

    Args:
        engine: executes the graphs.
        prefill_chunk: most tokens of one prefill call; bounds the memory of activations.
        width: tokens of every verification, padded behind the draft, for bit-exact decoding; None: as many as there
            are to verify. The capacity is that of the bundle less width − 1: a call always has room.

    Raises:
        EngineError: the target cannot be loaded; or a width is given, and the backend does not give a token the same
            bits in each row.
    """

    def __init__(self, engine: Engine, prefill_chunk: int, width: int | None = None) -> None:
        manifest = engine.bundle.manifest
        self._engine = engine
        self._graph = manifest.graphs["target"]
        self._vocabulary = manifest.target.vocab_size
        self._widest_kept = manifest.widest_verification  # profiles measure it as one sequence's
        self._chunk, self._width = prefill_chunk, width
        self._capacity = manifest.limits.capacity - reserved_slots(width)
        self.caches = Caches(engine, manifest.limits.capacity)
        self._cache_lengths = engine.allocate("int64", (1,))
        self._logits: dict[int, Buffer] = {}
        self._calls: dict[tuple[int, int], _TargetCall] = {}
        self._samplers: dict[tuple[str, int, int], _SamplerCall] = {}
        self._calls_version = self.caches.version
        self._nothing_drafted = Candidates(
            engine.allocate("int64", (1, 1)),
            engine.allocate("int64", (1, 1, 1)),
            engine.allocate("float32", (1, 1, 1)),
        )
        self._bind_target(1, 1)  # loads the graph here, so that neither its time nor its errors fall on a request
        if width is not None:
            check_rows(engine, width, self.caches.of(self._graph))

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def width(self) -> int | None:
        """Tokens of every verification; None: as many as there are to verify."""
        return self._width

    def prefill(self, request: Request) -> Verdict:
        """Cache the rest of the sequence's tokens in chunks, and draw the first token behind them."""
        sequence = request.sequence
        token_ids = sequence.token_ids
        while True:
            start = sequence.cache_length
            chunk = token_ids[start : start + self._chunk]
            # What is written behind the chunk is overwritten, as rejected drafts are.
            padding = [0] * (prefill_width(self._engine, len(chunk), self._chunk, self._capacity - start) - len(chunk))
            target = self._run_target([*chunk, *padding], start, rows=1, last=len(chunk) - 1)
            sequence.cache_length += len(chunk)
            if sequence.cache_length == len(token_ids):
                return self._accept(request, target.logits, NO_DRAFT, 0)

    def verify(self, request: Request, draft: Draft, verify_length: int) -> Verdict:
        sequence = request.sequence
        token_ids = [sequence.anchor, *draft.token_ids[:verify_length]]
        if self._width is not None:  # what is written behind the accepted tokens is overwritten, as rejected drafts are
            token_ids += [0] * (self._width - len(token_ids))
        target = self._run_target(token_ids, sequence.cache_length, rows=len(token_ids))
        return self._accept(request, target.logits, draft, verify_length)

    def _run_target(self, token_ids: Sequence[int], start: int, rows: int, last: int | None = None) -> _TargetCall:
        """Run the target over tokens at positions start …, with logits for the last `rows` of them.

        Args:
            last: the token that the last row is of; None: the last one.
        """
        self.caches.ensure(start + len(token_ids))
        if self._calls_version != self.caches.version:
            self._calls.clear()
            self._calls_version = self.caches.version
        width = len(token_ids)
        target = self._calls.get((width, rows)) or self._bind_target(width, rows)
        target.input_ids.write(token_ids)
        if last is not None:
            target.logit_rows.write(np.arange(last + 1 - rows, last + 1))
        self._cache_lengths.write(start)
        target.call.run()
        return target

    def _bind_target(self, width: int, rows: int) -> _TargetCall:
        allocate = self._engine.allocate
        input_ids, logit_rows = allocate("int64", (1, width)), allocate("int64", (1, rows))
        logit_rows.write(np.arange(width - rows, width))
        logits = self._logits.get(rows)
        if logits is None:
            logits = self._logits[rows] = allocate("float32", (1, rows, self._vocabulary))
        buffers = {
            "input_ids": input_ids,
            "cache_lengths": self._cache_lengths,
            "logit_rows": logit_rows,
            "logits": logits,
            **self.caches.of(self._graph),
        }
        target = _TargetCall(self._engine.bind("target", buffers), input_ids, logit_rows, logits)
        # A prompt's last chunk may have any width: then it is not kept.
        if width <= self._widest_kept or width == self._chunk or self._engine.few_shapes:
            self._calls[width, rows] = target
        return target

    def _accept(self, request: Request, logits: Buffer, draft: Draft, verify_length: int) -> Verdict:
        candidates = draft.candidates or self._nothing_drafted
        role = request.params.sampler_role
        key = (role, logits.shape[1], id(candidates))
        sampler = self._samplers.get(key)
        if sampler is None:
            sampler = self._samplers[key] = _SamplerCall(self._engine, role, logits, candidates)
        return sampler.accept(verify_length, request.params, request.random)


class _Block:
    """A drafter's graph for blocks of one size, and its buffers."""

    def __init__(self, engine: Engine, caches: Caches, role: str) -> None:
        self._engine, self._caches, self._role = engine, caches, role
        self._graph = engine.bundle.manifest.graphs[role]
        self.buffers: dict[str, Buffer] = {}
        for spec in (*self._graph.inputs, *self._graph.outputs):
            # base_logits are for inspection; what is not bound is not delivered
            if spec.name not in caches.buffers and spec.name not in self._graph.aliases and spec.name != "base_logits":
                self.buffers[spec.name] = engine.allocate(spec.dtype, sized(spec, {"batch": 1}))
        self.candidates = Candidates(
            self.buffers["draft_ids"], self.buffers["candidate_ids"], self.buffers["candidate_probs"]
        )
        self.size = self.candidates.draft_ids.shape[1]
        self.confidence_logits = self.buffers.get("confidence_logits")
        self._call = self._bind()

    def run(self) -> None:
        if self._call_version != self._caches.version:
            self._call = self._bind()
        self._call.run()

    def _bind(self) -> Call:
        self._call_version = self._caches.version
        return self._engine.bind(self._role, {**self.buffers, **self._caches.of(self._graph)})


class ModelDrafter:
    """A trained drafter's graph; shares the verifier's caches.

    Args:
        engine: executes the graph, and the one for short blocks where the bundle has it.
        caches: the verifier's.
        calibration: what makes chances of the confidence logits; None takes the logits at their word.
    """

    def __init__(self, engine: Engine, caches: Caches, calibration: Calibration | None = None) -> None:
        manifest = engine.bundle.manifest
        facts = manifest.drafter
        self._caches = caches
        self._limit = manifest.limits.capacity
        self._num_candidates = facts.candidates
        self._calibration, self._uncalibrated = calibration, Scaling.identity(facts.block_size)
        # By rising size. All are loaded here: the time of a first call would pass for what a draft costs.
        roles = [role for role in ("drafter_short", "drafter") if role in manifest.graphs]
        self._blocks = [_Block(engine, caches, role) for role in roles]

    @property
    def block_size(self) -> int:
        return self._blocks[-1].size

    def draft(self, request: Request, length: int) -> Draft:
        start, block = request.sequence.cache_length, self._block(length)
        if start + block.size > self._limit:  # the block's own keys and values have no room
            return NO_DRAFT
        self._caches.ensure(start + block.size)
        buffers, params = block.buffers, request.params
        buffers["anchor_ids"].write(request.sequence.anchor)
        buffers["cache_lengths"].write(start)
        buffers["temperature"].write(params.temperature)
        if params.greedy:
            buffers["noise"].write(0.0)
        else:
            buffers["noise"].write(request.random.gumbels(1, block.size, self._num_candidates))
        block.run()
        logits = confidences = None
        if block.confidence_logits is not None:
            logits = tuple(block.confidence_logits.read()[0].tolist())
            scaling = self._calibration.at(params.temperature) if self._calibration else self._uncalibrated
            confidences = scaling.confidences(logits)
        return Draft(tuple(block.candidates.draft_ids.read()[0].tolist()), logits, block.candidates, confidences)

    def _block(self, length: int) -> _Block:
        """The smallest that has so many tokens, or else the largest."""
        return next((block for block in self._blocks if block.size >= length), self._blocks[-1])
