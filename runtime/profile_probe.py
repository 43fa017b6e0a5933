"""Rounds that commit nothing, and how long their parts take: what a profile is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Buffer, Call, Engine
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.profile import SamplerRole
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.model import ModelDrafter, ModelVerifier
from dspark_edge.runtime.ngram import NgramDrafter
from dspark_edge.runtime.round import NO_DRAFT, Candidates, Draft, Drafter, Request
from dspark_edge.runtime.sampling import RandomStream, SamplingParams
from dspark_edge.runtime.sequence import Sequence

__all__ = ["Clock", "EngineView", "RoundProbe", "RoundTimes", "StreamProbe", "cache_noise"]

Clock = Callable[[], float]

PARAMS: Mapping[SamplerRole, SamplingParams] = {
    "sampler_greedy": SamplingParams(temperature=0.0),
    "sampler": SamplingParams(temperature=1.0),
    # top-k keeps the filters inside their pool, as peaked distributions of real text do: made-up tokens give flat ones
    "sampler_filtered": SamplingParams(temperature=0.7, top_k=50, top_p=0.9),
}
"""What requests of each kind ask for, where they are measured."""

_PREFILL_CHUNK = 256  # is never run here
_SEED = 0


@dataclass(frozen=True, slots=True)
class RoundTimes:
    """What the parts of a round took, the host's work included, in seconds."""

    draft_s: float | None  # None where nothing was drafted
    target_s: float  # from the draft to the end of the target's call
    sampler_s: float  # from there to the verdict
    block: int | None = None  # tokens of the draft, if it was a short one


class RoundProbe(Protocol):
    """Runs rounds of one batch size as decoding does, and tells what they took."""

    @property
    def batch(self) -> int: ...

    def run(self, context: int, width: int, sampler: SamplerRole) -> RoundTimes:
        """A round at `context` cached tokens a sequence that commits nothing; width 1 is a plain step, without draft.

        Raises:
            EngineError: the backend failed.
        """


class StreamProbe:
    """Rounds of a single stream with the runtime's own verifier and drafter.

    Args:
        engine: executes the graphs.
        batch: must be 1.
        longest: cache slots that the rounds need.
        clock: seconds.

    Raises:
        InvalidInputError: another batch is asked for.
        BundleError: the bundle's calibration is damaged.
    """

    def __init__(self, engine: Engine, batch: int, longest: int, clock: Clock = perf_counter) -> None:
        if batch != 1:
            raise InvalidInputError(f"batch {batch}: a single stream decodes 1 sequence; measure batch 1")
        self._clock = clock
        self._engine = _MarkingEngine(engine, clock)
        self._vocabulary = engine.bundle.manifest.target.vocab_size
        self._block_size = engine.bundle.manifest.drafter.block_size
        self._short_block = engine.bundle.manifest.short_block_size
        self._verifier = ModelVerifier(self._engine, _PREFILL_CHUNK)
        caches = self._verifier.caches
        caches.ensure(longest)  # growing later would void what rounds have bound
        for buffer in caches.buffers.values():
            buffer.write(cache_noise(buffer.shape))
        self._drafter = self._make_drafter(engine.bundle)
        self._stand_in = self._make_stand_in()
        self._sequences: dict[int, Sequence] = {}  # by context
        self._requests: dict[tuple[int, SamplerRole], Request] = {}

    @property
    def batch(self) -> int:
        return 1

    def run(self, context: int, width: int, sampler: SamplerRole) -> RoundTimes:
        request = self._request(context, sampler)
        clock = self._clock
        started = clock()
        # A short draft where it has all tokens that are verified.
        block = self._short_block if 1 < width <= self._short_block + 1 else None
        draft = self._drafter.draft(request, block or self._block_size) if width > 1 else NO_DRAFT
        draft_s = clock() - started
        if len(draft.token_ids) < width - 1:  # prompt lookup in a context that is too short for a block
            draft = self._stand_in
        started = clock()
        self._verifier.verify(request, draft, width - 1)
        verified = clock()
        target_ended = self._engine.ended["target"]
        return RoundTimes(draft_s if width > 1 else None, target_ended - started, verified - target_ended, block)

    def _request(self, context: int, sampler: SamplerRole) -> Request:
        request = self._requests.get((context, sampler))
        if request is None:
            # The same block again and again, so that a prompt lookup finds a whole one.
            token_ids = [index % (self._block_size + 1) % self._vocabulary for index in range(context + 1)]
            # One sequence for all kinds of sampling: a prompt lookup indexes another one from its first token.
            sequence = self._sequences.setdefault(context, Sequence(token_ids, context + 1, context))
            request = Request(sequence, PARAMS[sampler], RandomStream(_SEED))
            self._requests[context, sampler] = request
        return request

    def _make_drafter(self, bundle: Bundle) -> Drafter:
        facts = bundle.manifest.drafter
        if facts.kind == "ngram":
            return NgramDrafter(self._engine, facts.block_size)
        return ModelDrafter(self._engine, self._verifier.caches, Calibration.load(bundle))

    def _make_stand_in(self) -> Draft:
        # As wide as what several sequences verify together, of which a single one is measured in their place.
        size, allocate = self._engine.bundle.manifest.widest_verification - 1, self._engine.allocate
        candidates = Candidates(
            allocate("int64", (1, size)), allocate("int64", (1, size, 1)), allocate("float32", (1, size, 1))
        )
        candidates.candidate_probs.write(1.0)
        return Draft((0,) * size, None, candidates)


class EngineView:
    """Another engine's graphs and memory, for probes that time its calls. Whoever opened the other one closes it."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def bundle(self) -> Bundle:
        return self._engine.bundle

    @property
    def most_rows(self) -> int | None:
        return self._engine.most_rows

    @property
    def most_sequences(self) -> int | None:
        return self._engine.most_sequences

    @property
    def few_shapes(self) -> bool:
        return self._engine.few_shapes

    def allocate(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        return self._engine.allocate(dtype, shape)

    @property
    def alignment(self) -> int:
        return self._engine.alignment

    def window(self, buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> Buffer:
        return self._engine.window(buffer, shape, start)

    def copy(self, source: Buffer, start: int, target: Buffer, to: int, count: int) -> None:
        self._engine.copy(source, start, target, to, count)

    def bind(self, role: str, buffers: Mapping[str, Buffer]) -> Call:
        return self._engine.bind(role, buffers)

    def synchronize(self) -> None:
        self._engine.synchronize()

    def close(self) -> None:
        """Nothing: the engine behind it is not its own."""

    def __enter__(self) -> EngineView:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _MarkingEngine(EngineView):
    """Notes when the last run of each graph ended."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        super().__init__(engine)
        self.clock = clock
        self.ended: dict[str, float] = {}  # role → time

    def bind(self, role: str, buffers: Mapping[str, Buffer]) -> Call:
        return _MarkingCall(super().bind(role, buffers), role, self)


class _MarkingCall:
    __slots__ = ("_engine", "_role", "_run")

    def __init__(self, call: Call, role: str, engine: _MarkingEngine) -> None:
        self._run, self._role, self._engine = call.run, role, engine

    def run(self) -> None:
        self._run()
        self._engine.synchronize()
        self._engine.ended[self._role] = self._engine.clock()


def cache_noise(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """For caches: untouched memory is one page of zeros, which is read faster than any real cache."""
    slots = np.random.default_rng(_SEED).standard_normal((1, 1, *shape[2:]), dtype=np.float32)
    return np.broadcast_to(slots, shape)
