"""Scheduled decoding of a real (tiny) model with made-up costs: what it decides, says and keeps."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.engines.profile import Profile
from dspark_edge.engines.profile_device import probe_device
from dspark_edge.runtime import Generator, GeneratorOptions, SamplingParams
from dspark_edge.runtime.batching.policy import GroupScheduling, Member
from dspark_edge.runtime.calibration import Calibration, CalibrationData, Fit, Scaling
from dspark_edge.runtime.profiling import plan_profile, profile_engine
from dspark_edge.runtime.round import NO_DRAFT, Round
from dspark_edge.runtime.scheduled_policy import mean_conditionals
from dspark_edge.runtime.scheduling import (
    Controller,
    EarlyStop,
    Evidence,
    Lagged,
    LookAhead,
    Parking,
    Scheduler,
    Serial,
    Static,
)

from .scripted import TableCosts, Unobserved

LONG = SamplingParams(max_new_tokens=64)
CHEAP = TableCosts(target=(1.0, 1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.07), draft=0.05)
DEAR = TableCosts(target=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0), draft=0.5)
ROLES = ("sampler_greedy", "sampler", "sampler_filtered")


@contextmanager
def opened(
    bundle_dir: Path, costs: TableCosts, scheduler: Scheduler | None = None
) -> Iterator[tuple[Generator, list[Round]]]:
    rounds: list[Round] = []
    scheduling = Unobserved(dict.fromkeys(ROLES, costs), 7, scheduler)
    with Generator(
        OnnxRuntimeEngine(Bundle.open(bundle_dir), threads=1), observer=rounds.append, scheduling=scheduling
    ) as generator:
        yield generator, rounds


@pytest.mark.parametrize(
    "scheduler", [LookAhead(), EarlyStop(), Lagged(), Static(3)], ids=lambda one: type(one).__name__
)
@pytest.mark.parametrize("costs", [CHEAP, DEAR], ids=["cheap", "dear"])
def test_greedy_tokens_are_those_of_plain_decoding(
    bundle_dir: Path, plain_generator: Generator, record: Any, costs: TableCosts, scheduler: Scheduler
) -> None:
    with opened(bundle_dir, costs, scheduler) as (generator, _):
        assert generator.options.mode == "scheduled"
        for sample in record["samples"][:3]:
            assert (
                generator.generate(sample["prompt"], LONG).token_ids
                == plain_generator.generate(sample["prompt"], LONG).token_ids
            )


def test_cheap_verification_is_used_and_dear_one_parked(bundle_dir: Path, record: Any) -> None:
    prompt = record["samples"][0]["prompt"]
    with opened(bundle_dir, CHEAP) as (generator, rounds):
        cheap = generator.generate(prompt, LONG).statistics
        assert all(one.drafted for one in rounds)
    with opened(bundle_dir, DEAR) as (generator, rounds):
        dear = generator.generate(prompt, LONG).statistics
        assert sum(one.drafted > 0 for one in rounds) <= len(rounds) // 5
    assert cheap.mean_accepted_length > 1.5
    assert cheap.parked_s == 0 and cheap.drafted_rounds == cheap.rounds
    assert dear.parked_share > 0.5
    assert sum(dear.verify_length_counts) == dear.rounds
    assert dear.verify_length_counts[0] >= dear.rounds - dear.drafted_rounds


def test_statistics_add_up(bundle_dir: Path, record: Any) -> None:
    with opened(bundle_dir, CHEAP) as (generator, rounds):
        said = generator.generate(record["samples"][1]["prompt"], LONG).statistics
    metrics = said.metrics()
    assert metrics["spec_decode_num_drafts"] == said.drafted_rounds == len(rounds)
    assert metrics["spec_decode_num_draft_tokens"] == sum(one.verify_length for one in rounds) == said.draft_tokens
    assert metrics["spec_decode_num_accepted_tokens"] == sum(one.accepted_length - 1 for one in rounds)
    assert metrics["spec_decode_num_accepted_tokens_per_pos_0"] == sum(one.accepted_length > 1 for one in rounds)
    predicted = [0.05 + CHEAP.target[one.verify_length] for one in rounds]
    assert said.predicted_s == pytest.approx(sum(predicted))
    assert said.plain_s == pytest.approx(sum(one.accepted_length for one in rounds))
    assert said.speedup is not None and said.prediction_error is not None
    assert said.to_json()["spec_decode_num_drafts"] == said.drafted_rounds
    assert said.schedule_s > 0


def test_without_a_profile_nothing_is_predicted(generator: Generator) -> None:
    said = generator.generate([104, 105], SamplingParams(max_new_tokens=8)).statistics
    assert (said.predicted_s, said.plain_s, said.speedup, said.prediction_error) == (None,) * 4


def test_a_profiled_bundle_is_scheduled_by_default(bundle_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle_dir, folder)
    with pytest.raises(InvalidInputError, match="run: dspark-edge profile"):
        Generator.open(folder, mode="scheduled", threads=1)
    with Generator.open(folder, threads=1) as generator:
        assert generator.options.mode == "static"
    bundle = Bundle.open(folder)
    with OnnxRuntimeEngine(bundle, threads=1) as engine:
        plan = plan_profile(bundle.manifest, contexts=(16,), budget_s=0.01)
        profile_engine(engine, plan, probe_device("cpu", 1)).save(bundle)
    with Generator.open(folder, threads=1) as generator:
        assert generator.options.mode == "scheduled"
        said = generator.generate([104, 105], SamplingParams(max_new_tokens=8)).statistics
        assert said.predicted_s is not None
    with Generator.open(folder, verify_length=3, threads=1) as generator:
        assert generator.options.mode == "static"
    # Other threads, other times: it says so where it is asked for, and does without where it is not.
    with pytest.raises(InvalidInputError, match="number of threads was 1 and is 2"):
        Generator.open(folder, mode="scheduled", threads=2)
    with Generator.open(folder, threads=2) as generator:
        assert generator.options.mode == "static"
    assert Profile.load(bundle, probe_device("cpu", 1)) is not None


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(InvalidInputError, match="give one of the two"):
        GeneratorOptions("scheduled", verify_length=2)


def test_scheduled_without_a_scheduling(bundle_dir: Path) -> None:
    with (
        OnnxRuntimeEngine(Bundle.open(bundle_dir), threads=1) as engine,
        pytest.raises(InvalidInputError, match="needs a scheduling"),
    ):
        Generator(engine, GeneratorOptions("scheduled"))


def test_the_calibration_says_what_to_expect() -> None:
    nothing = (None, None, None)
    greedy = Fit(0.0, Scaling.identity(3), (100, 80, 20), nothing, nothing, nothing, nothing)
    drawn = Fit(1.0, Scaling.identity(3), (100, 50, 10), nothing, nothing, nothing, nothing)
    calibration = Calibration((greedy, drawn), CalibrationData("", 0, (), 0, 0))
    assert mean_conditionals(calibration, 0.0) == (0.8, 0.25, 0.25)
    assert mean_conditionals(calibration, 0.9) == (0.5, 0.2, 0.2)
    assert mean_conditionals(None, 0.0) is None
    assert mean_conditionals(Calibration.identity(3), 0.0) is None


def test_most_parked_rounds_are_neither_decided_nor_timed(
    bundle_dir: Path, record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for name in ("plain", "rested"):
        whole = getattr(Controller, name)
        monkeypatch.setattr(
            Controller, name, lambda *given, name=name, whole=whole: (asked.append(name), whole(*given))[1]
        )
    with opened(bundle_dir, DEAR) as (generator, rounds):
        said = generator.generate(record["samples"][0]["prompt"], LONG).statistics
    plain = sum(not one.drafted for one in rounds)
    assert plain > 40
    assert plain / 4 <= asked.count("plain") <= plain / 4 + 2 * said.drafted_rounds + 2
    assert all(one.prediction is not None and one.prediction.verify_s == 1.0 for one in rounds if not one.drafted)


def test_a_group_rests_as_long_as_it_stays_the_same() -> None:
    policy = GroupScheduling(DEAR, Serial, 7)
    params = SamplingParams(temperature=0.0)
    members = [Member(params, policy.join(params, 2), 100, 50) for _ in range(2)]
    for member in members:
        assert member.state is not None
        member.state.parking = Parking(Evidence(0.5, 1.0), 64, 40, True)

    def decode(of: list[Member]) -> bool:
        """One plain round; whether it was decided on."""
        decision = policy.decide(of)
        assert decision.drafting == (False,) * len(of)
        assert decision.lengths([NO_DRAFT] * len(of)) == (0,) * len(of)
        said = decision.prediction()
        assert said is not None and said.verify_s == len(of) * 1.0
        decision.learn([0] * len(of))
        return decision.observer is not None

    assert [decode(members) for _ in range(6)] == [True, False, False, False, True, False]
    assert [decode(members[:1]) for _ in range(2)] == [True, False]  # the other one has ended
    waits = [member.state.parking.remaining for member in members if member.state is not None]
    assert waits == [40 - 7, 40 - 6]  # the last round's rest is told of when it ends
