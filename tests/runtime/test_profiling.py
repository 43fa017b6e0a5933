"""Measuring costs: what is run, in which order, for how long; and real rounds on a small bundle."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import CapacityError, InvalidInputError
from dspark_edge.engines.manifest import Manifest
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.engines.profile import Profile, SamplerRole, graphs_digest
from dspark_edge.engines.profile_device import probe_device
from dspark_edge.runtime import ngram
from dspark_edge.runtime.profile_probe import RoundTimes, StreamProbe
from dspark_edge.runtime.profiling import ProfilePlan, measure, plan_profile, profile_engine

SAMPLERS: tuple[SamplerRole, ...] = ("sampler_greedy", "sampler", "sampler_filtered")
PLAN = ProfilePlan((1,), (1, 2, 4), (100, 200), (1, 2, 4), SAMPLERS, block_size=3, budget_s=60.0)


@dataclass
class FakeDevice:
    """A clock, and rounds that let it go on."""

    batch: int = 1
    slowdown: Callable[[float], float] = lambda now: 1.0
    now: float = 0.0
    rounds: list[tuple[int, int, SamplerRole]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def run(self, context: int, width: int, sampler: SamplerRole) -> RoundTimes:
        self.rounds.append((context, width, sampler))
        factor = self.slowdown(self.now)
        drawing = 1.0 + SAMPLERS.index(sampler)
        times = RoundTimes(
            0.002 * factor * drawing if width > 1 else None,
            self.batch * (0.010 + 0.001 * width + 0.00001 * context) * factor,
            0.0001 * width * factor * drawing,
        )
        self.now += (times.draft_s or 0.0) + times.target_s + times.sampler_s
        return times


def sweeps_of(device: FakeDevice, plan: ProfilePlan) -> int:
    """Sweeps behind the warm-up: a visit has an uncounted round, and two plain steps for one that counts."""
    warm_up = len(plan.widths) * len(plan.samplers)
    sweep = len(plan.contexts) * (len(plan.widths) + 2)
    assert (len(device.rounds) - warm_up) % sweep == 0
    return (len(device.rounds) - warm_up) // sweep


def test_even_times_end_the_measurement_early() -> None:
    device = FakeDevice()
    points = measure([device], PLAN, clock=device.clock)
    assert sweeps_of(device, PLAN) == 8 and device.now < 60
    target = {(point.width, point.context): point for point in points["target"]}
    assert list(target) == [(1, 100), (1, 200), (2, 100), (2, 200), (4, 100), (4, 200)]
    assert target[4, 200].median_s == pytest.approx(0.016)
    assert (target[4, 200].spread, target[4, 200].samples) == (0, 8)
    drafts = {point.context: point for point in points["drafter"]}
    assert {(point.batch, point.width) for point in points["drafter"]} == {(1, 3)}  # the block
    assert drafts[100].median_s == pytest.approx(0.002)
    assert 0.004 <= points["drafter_drawing"][0].median_s <= 0.006  # with filters, or without
    greedy = {point.width: point for point in points["sampler_greedy"]}
    assert greedy[4].median_s == pytest.approx(0.0004) and greedy[4].context == 0
    assert points["sampler_filtered"][0].median_s == pytest.approx(0.0003)
    counted = [point.samples for role in SAMPLERS for point in points[role]]
    assert sum(counted) == 8 * 6 and max(counted) - min(counted) <= 1


def test_uneven_times_use_the_budget_and_not_more() -> None:
    factors = np.random.default_rng(3).lognormal(0, 0.5, 100_000)
    device = FakeDevice(slowdown=lambda now: float(factors[len(device.rounds)]))
    plan = replace(PLAN, budget_s=20.0)
    points = measure([device], plan, clock=device.clock)
    assert 19.0 < device.now < 20.5
    assert all(point.spread > 0.3 for point in points["target"])


def test_three_sweeps_are_made_on_the_slowest_device() -> None:
    device = FakeDevice(slowdown=lambda now: 1000.0)
    points = measure([device], PLAN, clock=device.clock)
    assert sweeps_of(device, PLAN) == 3
    assert all(points[role] for role in ("target", "drafter", "drafter_drawing", *SAMPLERS))
    assert len(points["sampler_filtered"]) == 3  # every width has met every kind of sampling


def test_a_machine_that_slows_down_slows_all_widths_alike() -> None:
    device = FakeDevice(slowdown=lambda now: 1.0 + now / 10)
    points = measure([device], replace(PLAN, budget_s=30.0), clock=device.clock)
    medians = {(point.width, point.context): point.median_s for point in points["target"]}
    for (width, context), median in medians.items():
        expected = (0.010 + 0.001 * width + 0.00001 * context) / (0.011 + 0.00001 * 100)
        assert median / medians[1, 100] == pytest.approx(expected, rel=0.02)


def test_plain_steps_follow_plain_steps_and_visits_begin_uncounted() -> None:
    device = FakeDevice()
    measure([device], PLAN, clock=device.clock)
    rounds = device.rounds[len(PLAN.widths) * len(SAMPLERS) :]
    visits = [rounds[start : start + 5] for start in range(0, len(rounds), 5)]
    orders = Counter(tuple(width for _, width, _ in visit[1:]) for visit in visits)
    for visit in visits:
        assert len({context for context, _, _ in visit}) == 1
        assert visit[0][1] == 4  # not counted: the round before had another context
        widths = [width for _, width, _ in visit[1:]]
        assert sorted(widths) == [1, 1, 2, 4]
        assert sum(pair == (1, 1) for pair in pairwise(widths)) == 1
    assert len(orders) > 2  # the order changes
    assert [visit[0][0] for visit in visits] != [100, 200] * (len(visits) // 2)


def test_batches_are_measured_through_their_own_probes() -> None:
    one, four = FakeDevice(), FakeDevice(batch=4)
    points = measure([one, four], replace(PLAN, batches=(1, 4)), clock=lambda: one.now + four.now)
    medians = {(point.batch, point.width, point.context): point.median_s for point in points["target"]}
    assert len(medians) == 12
    assert medians[4, 2, 100] == pytest.approx(4 * medians[1, 2, 100])


@pytest.mark.parametrize("slowdown", [1.0, 50.0])
def test_progress_never_falls_and_ends_near_one(slowdown: float) -> None:
    device = FakeDevice(slowdown=lambda now: slowdown * (1 + now % 0.7))
    told: list[float] = []
    measure([device], replace(PLAN, budget_s=5.0), told.append, device.clock)
    assert told == sorted(told) and told[0] > 0 and 0.9 < told[-1] <= 1


@pytest.fixture
def manifest(bundle_dir: Path) -> Manifest:
    return Bundle.open(bundle_dir).manifest


def test_a_plan_of_all_that_is_usual(manifest: Manifest) -> None:
    plan = plan_profile(manifest)
    assert (plan.batches, plan.widths, plan.contexts) == ((1,), tuple(range(1, 9)), (128, 248))
    assert plan.samplers == SAMPLERS and plan.longest == 256 == manifest.limits.capacity
    large = replace(manifest, limits=replace(manifest.limits, capacity=2048))
    assert plan_profile(large).contexts == (128, 512, 1024, 2040)
    wide = replace(large, drafter=replace(manifest.drafter, block_size=40))
    assert plan_profile(wide).widths == (*range(1, 17), 17, 24, 32, 33, 41)
    few = {role: graph for role, graph in manifest.graphs.items() if role != "sampler_filtered"}
    assert plan_profile(replace(manifest, graphs=few)).samplers == ("sampler_greedy", "sampler")


def test_a_plan_as_given(manifest: Manifest) -> None:
    plan = plan_profile(manifest, widths=[4, 2, 4], contexts=[200, 0], batches=[1], budget_s=5)
    assert (plan.widths, plan.contexts, plan.budget_s) == ((1, 2, 4, 8), (0, 200), 5)


@pytest.mark.parametrize(
    ("given", "error", "problem"),
    [
        ({"widths": [9]}, InvalidInputError, "width 9: blocks of 7 drafts are verified at widths 1 to 8"),
        ({"widths": [0]}, InvalidInputError, "width 0"),
        (
            {"contexts": [249]},
            CapacityError,
            "context 249: the bundle's capacity of 256 tokens leaves room for 0 to 248",
        ),
        ({"contexts": [-1]}, CapacityError, "context -1"),
        ({"batches": [0]}, InvalidInputError, "batch 0: the bundle was exported for 1 to 1"),
        ({"budget_s": 0.0}, InvalidInputError, r"the budget is 0.0 s, expected more than 0"),
        ({"budget_s": float("nan")}, InvalidInputError, "the budget is nan s"),
    ],
)
def test_plans_that_do_not_fit_are_refused(
    manifest: Manifest, given: dict[str, Any], error: type[Exception], problem: str
) -> None:
    with pytest.raises(error, match=problem):
        plan_profile(manifest, **given)


def test_a_capacity_without_room_for_a_block_is_refused(manifest: Manifest) -> None:
    tiny = replace(manifest, limits=replace(manifest.limits, capacity=8))
    assert plan_profile(tiny).contexts == (0,)
    with pytest.raises(CapacityError, match="capacity of 7 tokens has no room for an anchor and a block of 7"):
        plan_profile(replace(tiny, limits=replace(manifest.limits, capacity=7)))


@pytest.fixture
def engine(bundle_dir: Path) -> Iterator[OnnxRuntimeEngine]:
    with OnnxRuntimeEngine(Bundle.open(bundle_dir), threads=1) as opened:
        yield opened


@pytest.fixture
def ngram_engine(bundle_dir: Path, tmp_path: Path) -> Iterator[OnnxRuntimeEngine]:
    """The same target with prompt lookup."""
    folder = shutil.copytree(bundle_dir, tmp_path / "ngram")
    data = json.loads((folder / "manifest.json").read_text())
    data["drafter"] = {
        **{key: 0 for key in data["drafter"] if type(data["drafter"][key]) is int},
        "kind": "ngram",
        "block_size": 7,
        "tap_layers": [],
        "markov_head": "none",
        "mask_token_id": None,
        "confidence": False,
    }
    del data["graphs"]["drafter"]
    (folder / "manifest.json").write_text(json.dumps(data))
    with OnnxRuntimeEngine(Bundle.open(folder), threads=1) as opened:
        yield opened


def ticking() -> Callable[[], float]:
    """A clock that goes on by 1 whenever it is read."""
    ticks = count()
    return lambda: float(next(ticks))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_round_is_timed_in_parts_that_add_up(engine: OnnxRuntimeEngine, sampler: SamplerRole) -> None:
    probe = StreamProbe(engine, 1, 256, ticking())
    # Read: at the start, when the drafter's graph ends, behind the draft; before verifying, when the target's graph
    # ends, when the sampler's does, and at the end.
    assert probe.run(128, 4, sampler) == RoundTimes(2, 1, 2)
    assert probe.run(248, 8, sampler) == RoundTimes(2, 1, 2)
    assert probe.run(0, 2, sampler) == RoundTimes(2, 1, 2)
    assert probe.run(128, 1, sampler) == RoundTimes(None, 1, 2)  # no drafter: nothing was read in between


def test_prompt_lookup_is_timed_without_a_graph(ngram_engine: OnnxRuntimeEngine) -> None:
    probe = StreamProbe(ngram_engine, 1, 256, ticking())
    assert probe.run(128, 8, "sampler") == RoundTimes(1, 1, 2)
    assert probe.run(0, 8, "sampler_greedy") == RoundTimes(1, 1, 2)  # nothing to look up: a stand-in is verified


def test_prompt_lookup_indexes_a_context_once(ngram_engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    create = ngram.NgramIndex.__init__

    def remember(self: ngram.NgramIndex, smallest: int, largest: int) -> None:
        made.append(self)
        create(self, smallest, largest)

    monkeypatch.setattr(ngram.NgramIndex, "__init__", remember)
    probe = StreamProbe(ngram_engine, 1, 256)
    before = len(made)
    for sampler in (*SAMPLERS, *SAMPLERS):
        probe.run(128, 8, sampler)
    assert len(made) == before + 1


def test_rounds_run_on_caches_that_are_written(engine: OnnxRuntimeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = []
    allocate = OnnxRuntimeEngine.allocate

    def remember(self: OnnxRuntimeEngine, dtype: str, shape: tuple[int, ...]) -> Any:
        buffer = allocate(self, dtype, shape)
        allocated.append(buffer)
        return buffer

    monkeypatch.setattr(OnnxRuntimeEngine, "allocate", remember)
    StreamProbe(engine, 1, 256)
    caches = [buffer for buffer in allocated if buffer.shape == (1, 2, 256, 16)]
    assert len(caches) == 16
    assert all((buffer.read() != 0).mean() > 0.99 for buffer in caches)


def test_a_probe_of_streams_refuses_batches(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(InvalidInputError, match="batch 2"):
        StreamProbe(engine, 2, 256)


def test_a_bundle_is_profiled(engine: OnnxRuntimeEngine) -> None:
    manifest = engine.bundle.manifest
    device = probe_device("cpu", 1)
    told: list[float] = []
    plan = plan_profile(manifest, widths=[2], contexts=[64], budget_s=0.001)
    profile = profile_engine(engine, plan, device, told.append)
    assert profile.bundle == graphs_digest(manifest) and profile.device == device
    assert [(point.width, point.context) for point in profile.points["target"]] == [(1, 64), (2, 64), (8, 64)]
    assert all(point.median_s > 0 and point.samples == 3 for point in profile.points["target"])
    assert profile.target_s(1, 4, 100) > 0 and profile.draft_s(1, 100) > 0 and profile.sampler_s(1, 4) > 0
    assert Profile.from_json(json.loads(profile.to_text())) == profile
    assert told[-1] == 1


def test_prompt_lookup_is_profiled(ngram_engine: OnnxRuntimeEngine) -> None:
    plan = plan_profile(ngram_engine.bundle.manifest, widths=[1], contexts=[64], budget_s=0.001)
    profile = profile_engine(ngram_engine, plan, probe_device("cpu", 1))
    assert profile.draft_s(1, 64) > 0 and [point.width for point in profile.points["drafter"]] == [7]


def test_another_probe_can_measure_batches(engine: OnnxRuntimeEngine) -> None:
    manifest = engine.bundle.manifest
    device = FakeDevice()
    asked: list[tuple[int, int]] = []

    def make(given: Any, batch: int, longest: int) -> FakeDevice:
        assert given is engine
        asked.append((batch, longest))
        return device if batch == 1 else replace(device, batch=batch)

    plan = replace(plan_profile(manifest, contexts=[64], budget_s=0.001), batches=(1, 2))
    profile = profile_engine(engine, plan, probe_device("cpu", 1), make_probe=make, clock=device.clock)
    assert asked == [(1, 72), (2, 72)]
    assert profile.target_s(2, 3, 64) == pytest.approx(2 * profile.target_s(1, 3, 64))
