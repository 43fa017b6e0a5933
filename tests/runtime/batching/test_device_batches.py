"""Batches on an engine whose memory is a device's, and whose windows begin at multiples of 256 bytes; emulated."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Engine
from dspark_edge.engines.errors import EngineError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.engines.tensorrt.engine import TensorRTEngine
from dspark_edge.engines.tensorrt.profiles import BuildSizes
from dspark_edge.runtime import Generator, GeneratorOptions, SamplingParams
from dspark_edge.runtime.batching import BatchGenerator
from dspark_edge.runtime.batching.opening import assemble
from dspark_edge.runtime.batching.options import BatchOptions
from dspark_edge.runtime.batching.probe import BatchProbe
from dspark_edge.runtime.encoding import PromptEncoder

from ...engines.emulated_gpu import EmulatedRuntime, emulate
from ..scripted import TableCosts

SLOTS = 4
SIZES = BuildSizes(SLOTS, 64, (1, 2, 3, 4, 5, 6, 7, 8))
TEXT = b"the cat sat on the mat and the dog sat on the log and so on and on"
PROMPTS = [list(TEXT[start : start + length]) for start, length in enumerate((3, 14, 1, 30, 7, 21, 5, 11))]
LENGTHS = (12, 3, 20, 8, 1, 15, 24, 6)
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
    {"temperature": 0.0},
    {"temperature": 0.8},
)
MIXED = [
    SamplingParams(max_new_tokens=length, seed=index, ignore_eos=True, **KINDS[index % len(KINDS)])
    for index, length in enumerate(LENGTHS)
]
GREEDY = [SamplingParams(max_new_tokens=length, temperature=0.0) for length in LENGTHS]
COSTS = TableCosts(target=(1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35), draft=0.05)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    kept = Path(__file__).parents[2] / "data" / "bundles" / "qwen3_rnn_decomposed"
    return Bundle.open(shutil.copytree(kept, tmp_path_factory.mktemp("device") / "bundle"))


def open_device(bundle: Bundle, integrated: bool = False) -> tuple[TensorRTEngine, EmulatedRuntime]:
    flavour, cuda, gpu = emulate(bundle, SIZES, gpu=EmulatedRuntime(integrated=integrated))
    return TensorRTEngine(bundle, flavour.backend, flavour, cuda), gpu


def batches(engine: Engine, mode: str, costs: TableCosts | None = None) -> BatchGenerator:
    parts = assemble(engine, BatchOptions(slots=SLOTS, prefill_chunk=8), mode, None, costs)
    return BatchGenerator(parts.executor, PromptEncoder.of(engine.bundle), parts.options, parts.policy)


def answer_all(generator: BatchGenerator, params: list[SamplingParams]) -> list[Any]:
    tickets = [generator.submit(prompt, one) for prompt, one in zip(PROMPTS, params, strict=True)]
    for _ in generator.run():
        pass
    return [ticket.result() for ticket in tickets]


def alone(bundle: Bundle, mode: str, params: list[SamplingParams]) -> list[tuple[int, ...]]:
    with Generator(OnnxRuntimeEngine(bundle, threads=1), GeneratorOptions(mode)) as single:
        found = []
        for prompt, one in zip(PROMPTS, params, strict=True):
            single.reset()
            found.append(single.generate(prompt, one).token_ids)
        return found


@pytest.mark.parametrize("integrated", [False, True], ids=["card", "jetson"])
@pytest.mark.parametrize("mode", ["plain", "static"])
def test_answers_of_all_kinds_are_those_of_a_single_stream(bundle: Bundle, mode: str, integrated: bool) -> None:
    """Requests join, leave, and are moved; neighbours that sample in another way begin within a row of 256 bytes."""
    engine, gpu = open_device(bundle, integrated)
    with batches(engine, mode) as generator:
        for _ in range(2):  # the second time by captured graphs
            answers = answer_all(generator, MIXED)
            assert [answer.token_ids for answer in answers] == alone(bundle, mode, MIXED)
    assert not gpu.device and not gpu.host


def test_a_schedule_changes_no_greedy_token(bundle: Bundle) -> None:
    engine, _ = open_device(bundle)
    with batches(engine, "scheduled", COSTS) as generator:
        answers = answer_all(generator, GREEDY)
        assert generator.statistics.committed > generator.statistics.rounds  # drafts are accepted
    assert [answer.token_ids for answer in answers] == alone(bundle, "plain", GREEDY)


def test_rounds_allocate_nothing_once_they_are_bound(bundle: Bundle) -> None:
    engine, gpu = open_device(bundle)
    params = [SamplingParams(max_new_tokens=24, temperature=0.0, ignore_eos=True)] * SLOTS
    with batches(engine, "static") as generator:
        for _ in range(3):
            generator.generate(PROMPTS[:SLOTS], params[0])
        gpu.calls.clear()
        before = generator.statistics.steps
        generator.generate(PROMPTS[:SLOTS], params[0])
        assert generator.statistics.steps - before > 5
        assert gpu.calls["cudaMalloc"] == gpu.calls["cudaHostAlloc"] == gpu.calls["cudaStreamBeginCapture"] == 0


def test_a_batch_is_measured(bundle: Bundle) -> None:
    engine, _ = open_device(bundle)
    with engine:
        times = BatchProbe(engine, SLOTS, 32).run(16, 4, "sampler")
        assert times.draft_s is not None and times.draft_s > 0 and times.target_s > 0 and times.sampler_s > 0


def test_more_slots_than_were_built_for_are_refused(bundle: Bundle) -> None:
    engine, _ = open_device(bundle)
    options = BatchOptions(slots=SLOTS + 1)
    with engine, pytest.raises(EngineError, match=r"the engine was not built for batch 5.*--max-batch"):
        parts = assemble(engine, options, "static", None, None)
        with BatchGenerator(parts.executor, PromptEncoder.of(bundle), options, parts.policy) as generator:
            generator.generate(PROMPTS[: SLOTS + 1], GREEDY[2])
