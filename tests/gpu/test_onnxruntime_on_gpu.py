"""ONNX Runtime's CUDA provider: the same tokens as on the CPU, buffers bound on the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import EngineError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.engines.tensorrt.cuda import Cuda
from dspark_edge.runtime.generator import Generator, GeneratorOptions
from dspark_edge.runtime.sampling import SamplingParams

PROMPT = [104, 101, 114, 101, 32, 105, 115]


@pytest.mark.parametrize("mode", ["plain", "static"])
def test_greedy_tokens_are_the_cpus(cuda: Cuda, mode: str) -> None:
    bundle = Bundle.open(Path(__file__).parents[1] / "data" / "bundles" / "qwen3_rnn_decomposed")
    params = SamplingParams(max_new_tokens=64, temperature=0.0, ignore_eos=True)
    try:
        on_gpu = OnnxRuntimeEngine(bundle, "cuda")
    except EngineError as error:
        pytest.skip(str(error))
    with Generator(on_gpu, GeneratorOptions(mode)) as generator:
        found = generator.generate(PROMPT, params)
    with Generator(OnnxRuntimeEngine(bundle), GeneratorOptions("plain")) as generator:
        expected = generator.generate(PROMPT, params)
    assert found.token_ids == expected.token_ids
