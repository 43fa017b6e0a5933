"""Measuring what rounds cost on this device, by running rounds.

A profile is only worth what its measurements are like the real thing. So it is taken with the runtime's own verifier
and drafter, on the same buffers and in the same order (draft, target, sampler), which gives caches and thread pools
the same history as in decoding. All widths, contexts and kinds of sampling take turns, sweep by sweep, in an order
that changes: a machine that slows down in the meantime slows all of them alike.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from time import perf_counter

import numpy as np

from dspark_edge.engines.engine import Engine
from dspark_edge.engines.errors import CapacityError, InvalidInputError
from dspark_edge.engines.manifest import Manifest
from dspark_edge.engines.profile import SAMPLER_ROLES, SCHEMA_VERSION, CostPoint, Profile, SamplerRole, graphs_digest
from dspark_edge.engines.profile_device import Device
from dspark_edge.runtime.profile_probe import Clock, RoundProbe, RoundTimes, StreamProbe

__all__ = ["ProfilePlan", "measure", "plan_profile", "profile_engine", "usual_batches"]

Progress = Callable[[float], None]
"""Is told the share of the work that is done."""

_CONTEXTS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
_ALL_WIDTHS_TO = 16  # beyond, both sides of the edges of common tiles are measured, and little in between
_WIDE_STEPS = (17, 24, 32, 33, 48, 64, 65, 96, 128)
_BATCHES = (1, 2, 4, 8)
_LONGEST_SHARED = 512  # tokens, of several sequences: attention is each one's own, so that longer contexts can be told
_LEAST_SWEEPS = 3  # whatever the budget: a median of fewer says nothing of its spread
_SWEEPS_BEFORE_PRECISE = 8  # fewer samples may be alike by chance
_PRECISE = 0.01  # standard error of each median, as a share of it, that ends the measurement early
_SEED = 0


MakeProbe = Callable[[Engine, int, int], RoundProbe]
"""(engine, batch, cache slots needed) → a probe. Raises InvalidInputError where it cannot run that batch."""


@dataclass(frozen=True, slots=True)
class ProfilePlan:
    """What to measure; `plan_profile` makes one that fits a bundle."""

    batches: tuple[int, ...]  # rising
    widths: tuple[int, ...]  # rising, from 1 to γ + 1, or to what packed sequences have together
    contexts: tuple[int, ...]  # rising: cached tokens of each sequence
    shared_widths: tuple[int, ...]  # of these, those at which several sequences share a call
    samplers: tuple[SamplerRole, ...]
    block_size: int  # γ
    budget_s: float  # seconds to measure for; three sweeps are made at least
    packed_sequences: int = 0  # of the packed graphs, whose drafts are one call for several sequences

    @property
    def longest(self) -> int:
        """Cache slots that the rounds of a single sequence need."""
        return self.slots(1)

    def widths_of(self, batch: int) -> tuple[int, ...]:
        """What is measured at a batch; calls that are a single sequence's are measured there alone."""
        return self.widths if batch == 1 else self.shared_widths

    def rounds_of(self, batch: int) -> tuple[int, ...]:
        """Widths of the rounds that are run to measure it: one with drafts, where they are shared."""
        widths = self.widths_of(batch)
        return (1, self.block_size + 1) if widths == (1,) and batch <= self.packed_sequences else widths

    def contexts_of(self, batch: int) -> tuple[int, ...]:
        """What is measured at a batch: caches of many sequences shall fit beside each other."""
        if batch == 1:
            return self.contexts
        return tuple(context for context in self.contexts if context <= _LONGEST_SHARED) or self.contexts[:1]

    def slots(self, batch: int) -> int:
        """Cache slots of a sequence that the rounds of a batch need."""
        return self.contexts_of(batch)[-1] + max(self.rounds_of(batch)[-1], self.block_size + 1)


def plan_profile(
    manifest: Manifest,
    widths: Sequence[int] = (),
    contexts: Sequence[int] = (),
    batches: Sequence[int] = (),
    budget_s: float = 60.0,
) -> ProfilePlan:
    """What to measure of a bundle. 1 and γ + 1 are always among the widths, and the widest of a short draft.

    Packed calls are priced as a single sequence's of as many tokens, so that these are measured, too.

    Args:
        manifest: the bundle's.
        widths: empty for all of them, or of a wide block for those around the edges of tiles.
        contexts: empty for 128, 512, 1024, 2048, … and the longest that the capacity allows.
        batches: empty for 1 alone; see `usual_batches`.
        budget_s: seconds to measure for.

    Raises:
        InvalidInputError: a number is out of the bundle's range (CapacityError: a context).
    """
    block, capacity = manifest.drafter.block_size, manifest.limits.capacity
    # A round writes an anchor and a block behind the context; in a small cache wider calls are not measured.
    widest = manifest.widest_verification if manifest.widest_verification <= capacity else block + 1
    longest = capacity - widest
    if longest < 0:
        raise CapacityError(
            f"the bundle's capacity of {capacity} tokens has no room for an anchor and a block of {block} drafts, so "
            "there is nothing to schedule; export with a larger --capacity"
        )
    for width in widths:
        if not 1 <= width <= widest:
            raise InvalidInputError(f"width {width}: blocks of {block} drafts are verified at widths 1 to {widest}")
    for context in contexts:
        if not 0 <= context <= longest:
            raise CapacityError(
                f"context {context}: the bundle's capacity of {capacity} tokens leaves room for 0 to {longest}, with "
                f"{widest} tokens of a round behind them"
            )
    serial = manifest.lowering == "ort"  # whose attention takes several sequences at width 1, however many
    for batch in batches:
        if batch < 1 or (batch > manifest.limits.max_batch and not serial):
            raise InvalidInputError(f"batch {batch}: the bundle was exported for 1 to {manifest.limits.max_batch}")
    if not budget_s > 0:
        raise InvalidInputError(f"the budget is {budget_s} s, expected more than 0")
    ends = {1, block + 1, widest, *({short + 1} if (short := manifest.short_block_size) else ())}
    measured = tuple(sorted({*ends, *(widths or _usual_widths(widest, block + 1))}))
    return ProfilePlan(
        batches=tuple(sorted({1, *batches})),  # what larger batches lack is derived from a single sequence's
        widths=measured,
        shared_widths=(1,) if serial else measured,
        contexts=tuple(sorted(set(contexts))) or _usual_contexts(longest),
        samplers=tuple(role for role in SAMPLER_ROLES if role in manifest.graphs),
        block_size=block,
        budget_s=budget_s,
        packed_sequences=manifest.packed_sequences,
    )


def usual_batches(engine: Engine) -> tuple[int, ...]:
    """Batches that are worth measuring of an engine's bundle."""
    manifest, most = engine.bundle.manifest, engine.most_sequences
    exported = None if manifest.lowering == "ort" else manifest.limits.max_batch
    return tuple(batch for batch in _BATCHES if all(limit is None or batch <= limit for limit in (most, exported)))


def profile_engine(
    engine: Engine,
    plan: ProfilePlan,
    device: Device,
    progress: Progress | None = None,
    make_probe: MakeProbe | None = None,
    clock: Clock = perf_counter,
) -> Profile:
    """Measure an engine's bundle. Writes nothing: see `Profile.save`.

    Args:
        engine: executes the graphs; stays open.
        plan: of this bundle.
        device: what the engine runs on, see `probe_device`.
        progress: is told after every round.
        make_probe: makes the probe of a batch size; None: as single streams and batches are decoded.
        clock: seconds.

    Raises:
        InvalidInputError: a batch cannot be measured.
        EngineError: the backend failed.
    """
    make = make_probe or _usual_probe
    probes = [make(engine, batch, plan.slots(batch)) for batch in plan.batches]
    points = measure(probes, plan, progress, clock)
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return Profile(SCHEMA_VERSION, now, _version(), graphs_digest(engine.bundle.manifest), device, points)


def measure(
    probes: Sequence[RoundProbe], plan: ProfilePlan, progress: Progress | None = None, clock: Clock = perf_counter
) -> dict[str, tuple[CostPoint, ...]]:
    """Run rounds until the costs are known to 1 %, or the budget is used.

    A sweep visits every batch and context once, and there every width once, in an order that is drawn anew. A visit
    begins with a round that is not counted, since the one before had another context. A plain step follows another
    plain step, as it does where nothing is drafted. The kinds of sampling take turns.

    Returns:
        role → points, as a `Profile` holds them.
    """
    order = random.Random(_SEED)
    samples = _Samples(plan)
    started = clock()
    _warm_up(probes, plan)
    sweep_s = 0.0
    while not samples.enough(clock() - started + sweep_s):
        sweep_started = clock()
        visits = [(probe, place) for probe in probes for place in range(len(plan.contexts_of(probe.batch)))]
        order.shuffle(visits)
        for done, (probe, place) in enumerate(visits):
            for visited in _visit(probe, place, plan, samples, order):
                if progress is not None:
                    progress(samples.share((done + visited) / len(visits), clock() - started))
        samples.sweeps += 1
        sweep_s = clock() - sweep_started
    return samples.points()


class _Samples:
    """Times by role, batch, width and context."""

    def __init__(self, plan: ProfilePlan) -> None:
        self._plan = plan
        self._times: dict[tuple[str, int, int, int], list[float]] = {}
        self.sweeps = 0

    def add(self, probe: RoundProbe, context: int, width: int, sampler: SamplerRole, times: RoundTimes) -> None:
        batch = probe.batch
        if width in self._plan.widths_of(batch):
            self._append("target", batch, width, context, times.target_s)
            self._append(sampler, batch, width, 0, times.sampler_s)
        if times.draft_s is not None:
            role = "drafter" if sampler == "sampler_greedy" else "drafter_drawing"
            self._append(role, batch, times.block or self._plan.block_size, context, times.draft_s)

    def enough(self, elapsed_s: float) -> bool:
        """Whether to stop; `elapsed_s` is when another sweep would end."""
        if self.sweeps < _LEAST_SWEEPS:
            return False
        if elapsed_s > self._plan.budget_s:
            return True
        return self.sweeps >= _SWEEPS_BEFORE_PRECISE and all(
            point.deviation_s <= _PRECISE * point.median_s for point in self._of("target") + self._of("drafter")
        )

    def share(self, of_sweep: float, elapsed_s: float) -> float:
        """How much is done, as far as it can be told before it is."""
        of_budget = elapsed_s / self._plan.budget_s
        return min(1.0, of_budget, (self.sweeps + of_sweep) / _LEAST_SWEEPS)

    def points(self) -> dict[str, tuple[CostPoint, ...]]:
        roles = ("target", "drafter", "drafter_drawing", *self._plan.samplers)
        return {role: self._of(role) for role in roles}

    def _of(self, role: str) -> tuple[CostPoint, ...]:
        keys = sorted(key for key in self._times if key[0] == role)
        return tuple(_point(*key[1:], self._times[key]) for key in keys)

    def _append(self, role: str, batch: int, width: int, context: int, seconds: float) -> None:
        self._times.setdefault((role, batch, width, context), []).append(seconds)


def _usual_probe(engine: Engine, batch: int, slots: int) -> RoundProbe:
    """A probe of rounds as they are decoded: of a single stream, or of a batch."""
    if batch == 1:
        return StreamProbe(engine, batch, slots)
    from dspark_edge.runtime.batching.probe import BatchProbe

    return BatchProbe(engine, batch, slots)


def _point(batch: int, width: int, context: int, times: Sequence[float]) -> CostPoint:
    low, median, high = np.percentile(times, (25, 50, 75)).tolist()
    spread = (high - low) / median if median > 0 else 0.0
    return CostPoint(batch, width, context, round(median, 9), round(spread, 6), len(times))


def _warm_up(probes: Sequence[RoundProbe], plan: ProfilePlan) -> None:
    """Bind every call once, and let each graph plan its memory; the times are no rounds' times."""
    for probe in probes:
        for sampler in plan.samplers:
            for width in plan.rounds_of(probe.batch):
                probe.run(plan.contexts[0], width, sampler)


def _visit(
    probe: RoundProbe, place: int, plan: ProfilePlan, samples: _Samples, order: random.Random
) -> Iterator[float]:
    """One round of each width at the context in this place; yields the share of them that is done."""
    context = plan.contexts[place]
    widths = plan.rounds_of(probe.batch)
    turns = list(enumerate(widths))
    order.shuffle(turns)
    probe.run(context, widths[-1], plan.samplers[0])
    for done, (index, width) in enumerate(turns, start=1):
        sampler = plan.samplers[(samples.sweeps + place + index) % len(plan.samplers)]
        if width == 1:
            probe.run(context, 1, sampler)
        samples.add(probe, context, width, sampler, probe.run(context, width, sampler))
        yield done / len(turns)


def _usual_widths(widest: int, of_one: int) -> tuple[int, ...]:
    """All that are few, and of more those at the edges of tiles.

    Args:
        widest: of the calls of one sequence, or of several that share one.
        of_one: widest of the first; every other width of the second is close enough.
    """
    few = min(widest, _ALL_WIDTHS_TO)
    return (
        *(width for width in range(1, few + 1) if width <= of_one or width % 2 == 0),
        *(width for width in _WIDE_STEPS if width < widest),
    )


def _usual_contexts(longest: int) -> tuple[int, ...]:
    return (*(context for context in _CONTEXTS if context < longest), longest)


def _version() -> str:
    try:
        return metadata.version("dspark-edge")
    except metadata.PackageNotFoundError:
        return "unknown"
