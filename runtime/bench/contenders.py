"""A mode of a bundle at a concurrency, ready to run: one stream through `Generator`, several through `BatchGenerator`.

All contenders of a bundle share one engine, with its threads and its weights in memory: they differ in nothing but
what they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import median
from types import TracebackType
from typing import Protocol

from dspark_edge.engines.engine import Engine
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.answer import Generation
from dspark_edge.runtime.batching.batch_generator import BatchGenerator
from dspark_edge.runtime.batching.opening import assemble
from dspark_edge.runtime.batching.options import BatchOptions
from dspark_edge.runtime.batching.ticket import Ticket
from dspark_edge.runtime.bench.settings import Mode
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.encoding import Prompt, PromptEncoder
from dspark_edge.runtime.generator import Generator, GeneratorOptions
from dspark_edge.runtime.profile_probe import EngineView
from dspark_edge.runtime.sampling import SamplingParams
from dspark_edge.runtime.scheduled_policy import StreamScheduling
from dspark_edge.runtime.scheduling import Costs
from dspark_edge.runtime.statistics import EngineStatistics

__all__ = ["Contender", "ModelContender", "Run", "whole"]

_QUEUE = 100_000  # a run hands in all its requests at once
# Chunks that follow observed times would let one mode meet fuller groups than another.
_PREFILL_CHUNK = 64


@dataclass(frozen=True, slots=True)
class Run:
    """Answers to some prompts, and what they took.

    Several requests at a time are so many until the last answer is there: a mode whose answers end one by one would be
    judged by how it decodes fewer otherwise. What is asked again for that counts in all numbers but the answers.
    """

    tokens: int  # behind each answer's first, which the prefill gives
    decode_s: float  # without prefill
    rounds: int  # of single requests
    committed: int  # in these rounds
    steps: int  # rounds of all requests together
    observed_s: float  # drafts and verifications
    parked_s: float  # of these, without any draft
    schedule_s: float
    prediction_error: float | None  # median over the latest steps
    answers: tuple[tuple[int, ...], ...]

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.decode_s if self.decode_s > 0 else 0.0


def whole(parts: Sequence[Run]) -> Run:
    """One run of several, at least one, that belong to one repeat."""
    errors = [part.prediction_error for part in parts if part.prediction_error is not None]
    return Run(
        tokens=sum(part.tokens for part in parts),
        decode_s=sum(part.decode_s for part in parts),
        rounds=sum(part.rounds for part in parts),
        committed=sum(part.committed for part in parts),
        steps=sum(part.steps for part in parts),
        observed_s=sum(part.observed_s for part in parts),
        parked_s=sum(part.parked_s for part in parts),
        schedule_s=sum(part.schedule_s for part in parts),
        prediction_error=median(errors) if errors else None,
        answers=tuple(answer for part in parts for answer in part.answers),
    )


class Contender(Protocol):
    """Answers prompts in its own way."""

    @property
    def mode(self) -> Mode: ...

    def run(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Run:
        """Answer all prompts, as many at a time as its concurrency, and tell what that took.

        Raises:
            InvalidInputError: a prompt does not fit the bundle.
            EngineError: the backend failed.
        """


class ModelContender:
    """A bundle on an engine. A context manager.

    Args:
        engine: executes the graphs; stays open.
        mode: how it decodes.
        concurrency: requests at a time.
        costs: by sampler role, as profiled; needed by mode scheduled.

    Raises:
        InvalidInputError: the mode does not fit the bundle, or is scheduled without costs.
        EngineError: memory is short, or the engine has no windows on it, which several requests at a time need.
    """

    def __init__(self, engine: Engine, mode: Mode, concurrency: int, costs: Mapping[str, Costs] | None) -> None:
        if mode.name == "scheduled" and costs is None:
            raise InvalidInputError("mode 'scheduled' needs a profile; run: dspark-edge profile BUNDLE")
        self._mode = mode
        view = EngineView(engine)
        self._generator = _single(view, mode, costs) if concurrency == 1 else _many(view, mode, concurrency, costs)

    @property
    def mode(self) -> Mode:
        return self._mode

    def run(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> Run:
        generator = self._generator
        before = generator.statistics
        if isinstance(generator, Generator):
            answers = _one_by_one(generator, prompts, params)
            after = generator.statistics
            tokens = after.new_tokens - before.new_tokens - len(answers)
        else:
            answers, after, tokens = _together(generator, prompts, params)
        return _difference(before, after, tokens, tuple(answer.token_ids for answer in answers))

    def close(self) -> None:
        """Release its caches. May be called twice."""
        self._generator.close()

    def __enter__(self) -> ModelContender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _one_by_one(generator: Generator, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> list[Generation]:
    found = []
    for prompt, asked in zip(prompts, params, strict=True):
        generator.reset()
        found.append(generator.generate(prompt, asked))
    return found


def _together(
    generator: BatchGenerator, prompts: Sequence[Prompt], params: Sequence[SamplingParams]
) -> tuple[list[Generation], EngineStatistics, int]:
    """Answers; the statistics when the last of them was there; tokens behind first ones until then.

    Where one ends and none waits, a prompt is asked again, and cancelled in the end.
    """
    tickets = [generator.submit(prompt, asked) for prompt, asked in zip(prompts, params, strict=True)]
    again, extra = cycle(zip(prompts, params, strict=True)), list[Ticket]()
    started: set[int] = set()
    tokens = 0
    while not all(ticket.done for ticket in tickets):
        while generator.active + generator.waiting < generator.options.slots:
            extra.append(generator.submit(*next(again)))
        for event in generator.step():
            started.add(event.request_id)
            tokens += len(event.token_ids)
    after = generator.statistics
    for ticket in extra:
        ticket.cancel()
    while not generator.idle:
        generator.step()
    return [ticket.result() for ticket in tickets], after, tokens - len(started)


def _single(engine: Engine, mode: Mode, costs: Mapping[str, Costs] | None) -> Generator:
    scheduling = None
    if mode.name == "scheduled" and costs is not None:
        bundle = engine.bundle
        block_size, calibration = bundle.manifest.drafter.block_size, Calibration.load(bundle)
        scheduling = StreamScheduling(costs, block_size, calibration=calibration)
    return Generator(engine, GeneratorOptions(mode.name, mode.verify_length), scheduling=scheduling)


def _many(engine: Engine, mode: Mode, slots: int, costs: Mapping[str, Costs] | None) -> BatchGenerator:
    options = BatchOptions(slots=slots, queue=_QUEUE, prefill_chunk=_PREFILL_CHUNK)
    parts = assemble(engine, options, mode.name, mode.verify_length, costs if mode.name == "scheduled" else None)
    return BatchGenerator(parts.executor, PromptEncoder.of(engine.bundle), parts.options, parts.policy)


def _difference(
    before: EngineStatistics, after: EngineStatistics, tokens: int, answers: tuple[tuple[int, ...], ...]
) -> Run:
    def of(name: str) -> float:
        return float(getattr(after, name) - getattr(before, name))

    return Run(
        tokens=tokens,
        decode_s=of("decode_s"),
        rounds=round(of("rounds")),
        committed=round(of("committed")),
        steps=round(of("steps")),
        observed_s=of("draft_s") + of("verify_s"),
        parked_s=of("parked_s"),
        schedule_s=of("schedule_s"),
        prediction_error=after.prediction_error,
        answers=answers,
    )
