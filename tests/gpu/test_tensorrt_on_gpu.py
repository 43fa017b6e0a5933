"""TensorRT engines on a real device: their numbers, their captured graphs, their memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Buffer, Engine, HostArray, sized
from dspark_edge.engines.errors import EngineError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.engines.tensorrt.cuda import Cuda
from dspark_edge.engines.tensorrt.engine import TensorRTEngine
from dspark_edge.engines.tensorrt.flavour import Flavour
from dspark_edge.runtime.generator import Generator, GeneratorOptions
from dspark_edge.runtime.profile_probe import EngineView
from dspark_edge.runtime.sampling import SamplingParams

PROMPT = [104, 101, 114, 101, 32, 105, 115]


@pytest.fixture(scope="module")
def engine(built: Bundle, flavour: Flavour, cuda: Cuda) -> Iterator[TensorRTEngine]:
    with TensorRTEngine(built, flavour.backend, flavour, cuda) as opened:
        yield opened


def logits_of(engine: Engine, tokens: HostArray, width: int) -> HostArray:
    """Logits of all positions [P, V], in calls of a width."""
    graph = engine.bundle.manifest.graphs["target"]
    sizes = {"batch": 1, "width": width, "rows": width, "capacity": engine.bundle.manifest.limits.capacity}
    buffers: dict[str, Buffer] = {
        spec.name: engine.allocate(spec.dtype, sized(spec, sizes)) for spec in (*graph.inputs, graph.outputs[0])
    }
    buffers["logit_rows"].write(np.arange(width)[None])
    call, found = engine.bind("target", buffers), []
    for begin in range(0, len(tokens), width):
        buffers["input_ids"].write(tokens[None, begin : begin + width])
        buffers["cache_lengths"].write(begin)
        call.run()
        found.append(buffers["logits"].read()[0].copy())
    return np.concatenate(found)


@pytest.mark.parametrize("width", [1, 4, 8])
def test_logits_are_those_of_onnxruntime(engine: TensorRTEngine, width: int) -> None:
    """By calls that are enqueued, captured and launched; products may be taken in TF32."""
    tokens = np.random.default_rng(0).integers(0, 256, 64)
    with OnnxRuntimeEngine(engine.bundle) as reference:
        expected = logits_of(reference, tokens, 8)
    found = logits_of(engine, tokens, width)
    assert np.abs(found - expected).max() < 2e-2 * np.abs(expected).max()
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.99


def test_weights_of_4_bits_say_what_onnxruntime_says(built_w4a16: Bundle, flavour: Flavour, cuda: Cuda) -> None:
    """TensorRT multiplies with them in half precision, ONNX Runtime dequantises them and multiplies in float32."""
    tokens = np.random.default_rng(0).integers(0, 256, 64)
    with OnnxRuntimeEngine(built_w4a16) as reference:
        expected = logits_of(reference, tokens, 8)
    with TensorRTEngine(built_w4a16, flavour.backend, flavour, cuda) as engine:
        found = logits_of(engine, tokens, 8)
    assert np.abs(found - expected).max() < 5e-2 * np.abs(expected).max()
    assert (found.argmax(-1) == expected.argmax(-1)).mean() >= 0.95


def test_captured_runs_say_what_enqueued_ones_say(engine: TensorRTEngine) -> None:
    tokens = np.arange(8)
    runs = []
    for _ in range(2):
        found = logits_of(engine, np.tile(tokens, 4), 8)
        runs.append(found)
    assert np.array_equal(runs[0], runs[1])


def test_static_decoding_says_what_plain_decoding_says(engine: TensorRTEngine) -> None:
    params = SamplingParams(max_new_tokens=96, temperature=0.0, ignore_eos=True)
    view = EngineView(engine)
    answers = [Generator(view, GeneratorOptions(mode)).generate(PROMPT, params) for mode in ("plain", "static")]
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[1].statistics.rounds < 96


@pytest.mark.parametrize("params", [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}])
def test_equal_seeds_give_equal_answers(engine: TensorRTEngine, params: dict[str, float]) -> None:
    asked = SamplingParams(max_new_tokens=48, seed=5, ignore_eos=True, **params)  # type: ignore[arg-type]
    view = EngineView(engine)
    answers = [Generator(view, GeneratorOptions("static")).generate(PROMPT, asked) for _ in range(2)]
    assert answers[0].token_ids == answers[1].token_ids


def test_memory_is_given_back(built: Bundle, flavour: Flavour, cuda: Cuda) -> None:
    free = []
    for _ in range(4):
        with TensorRTEngine(built, flavour.backend, flavour, cuda) as opened:
            logits_of(opened, np.arange(16), 8)
        gc.collect()
        free.append(cuda.free_memory()[0])
    assert free[1] - free[-1] < 32 << 20  # the first one loads libraries


def test_memory_that_is_short_is_named(engine: TensorRTEngine, cuda: Cuda) -> None:
    rows = cuda.free_memory()[1] // 4096 + 1
    with pytest.raises(EngineError, match=r"the GPU has no room for a buffer float32 .* are free"):
        engine.allocate("float32", (rows, 1024))
    logits_of(engine, np.arange(8), 8)  # and all goes on


def test_a_shape_that_is_not_built_is_refused(engine: TensorRTEngine) -> None:
    with pytest.raises(EngineError, match=r"was not built for .*width 9"):
        logits_of(engine, np.arange(9), 9)
