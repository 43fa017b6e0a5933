"""Rounds of a batch that commit nothing, and how long their parts take; `StreamProbe` for several sequences."""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter

from dspark_edge.engines.engine import Buffer, Call, Engine
from dspark_edge.engines.profile import SamplerRole
from dspark_edge.runtime.batching.executor import ModelExecutor, choose_grouping
from dspark_edge.runtime.profile_probe import PARAMS, Clock, EngineView, RoundTimes, cache_noise
from dspark_edge.runtime.round import Draft, Request
from dspark_edge.runtime.sampling import RandomStream
from dspark_edge.runtime.sequence import Sequence

__all__ = ["BatchProbe"]

_PREFILL_CHUNK = 256  # is never run here
_SEED = 0


class BatchProbe:
    """Rounds of a batch in the grouping that batches of the bundle are decoded with.

    Where that is serial, a wide round's `target_s` is the sum of its calls.

    Args:
        engine: executes the graphs; stays open.
        batch: sequences.
        longest: cache slots that the rounds need.
        clock: seconds.

    Raises:
        EngineError: the engine has no windows on its memory.
        BundleError: the bundle's calibration is damaged.
    """

    def __init__(self, engine: Engine, batch: int, longest: int, clock: Clock = perf_counter) -> None:
        self._batch, self._clock = batch, clock
        self._engine = _TimingEngine(engine, clock)
        manifest = engine.bundle.manifest
        self._vocabulary, self._block_size = manifest.target.vocab_size, manifest.drafter.block_size
        grouping = choose_grouping(engine, "auto", batch, drafting=True)
        self._executor = ModelExecutor(self._engine, batch, grouping, True, _PREFILL_CHUNK)
        self._executor.caches.ensure(longest)  # growing later would void what rounds have bound
        self._executor.caches.write(cache_noise)
        self._requests: dict[tuple[int, SamplerRole], list[Request]] = {}
        self._stand_in = Draft((0,) * self._block_size)

    @property
    def batch(self) -> int:
        return self._batch

    def run(self, context: int, width: int, sampler: SamplerRole) -> RoundTimes:
        requests = self._of(context, sampler)
        drafts, draft_s = [self._stand_in] * self._batch, None
        if width > 1:
            started = self._clock()
            found = self._executor.draft(requests, [True] * self._batch)
            draft_s = self._clock() - started
            # Prompt lookup may find less than a block in a context that is too short for one.
            drafts = [draft if len(draft.token_ids) >= width - 1 else self._stand_in for draft in found]
        self._engine.sampler_s = 0.0
        started = self._clock()
        self._executor.verify(requests, drafts, [width - 1] * self._batch)
        verify_s = self._clock() - started
        return RoundTimes(draft_s, verify_s - self._engine.sampler_s, self._engine.sampler_s)

    def _of(self, context: int, sampler: SamplerRole) -> list[Request]:
        requests = self._requests.get((context, sampler))
        if requests is None:
            # The same block again and again, so that a prompt lookup finds a whole one.
            token_ids = [index % (self._block_size + 1) % self._vocabulary for index in range(context + 1)]
            requests = self._requests[context, sampler] = [
                Request(Sequence(list(token_ids), context + 1, context), PARAMS[sampler], RandomStream(_SEED + row))
                for row in range(self._batch)
            ]
        return requests


class _TimingEngine(EngineView):
    """Sums what its samplers' runs take."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        super().__init__(engine)
        self._clock = clock
        self.sampler_s = 0.0

    def bind(self, role: str, buffers: Mapping[str, Buffer]) -> Call:
        call = super().bind(role, buffers)
        return _TimedCall(call, self) if role.startswith("sampler") else call

    def time(self, call: Call) -> None:
        started = self._clock()
        call.run()
        self.sampler_s += self._clock() - started


class _TimedCall:
    __slots__ = ("_call", "_engine")

    def __init__(self, call: Call, engine: _TimingEngine) -> None:
        self._call, self._engine = call, engine

    def run(self) -> None:
        self._engine.time(self._call)
