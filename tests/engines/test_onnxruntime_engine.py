"""The ONNX Runtime engine: bindings that fit run in place, others are refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Buffer, HostArray, sized
from dspark_edge.engines.errors import EngineError, InvalidInputError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine

SIZES = {"batch": 1, "width": 3, "rows": 1, "capacity": 256}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    # The lowering that every supported ONNX Runtime runs.
    return Bundle.open(Path(__file__).parents[1] / "data" / "bundles" / "qwen3_rnn_decomposed")


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Iterator[OnnxRuntimeEngine]:
    with OnnxRuntimeEngine(bundle, threads=1) as opened:
        yield opened


def target_buffers(engine: OnnxRuntimeEngine) -> dict[str, Buffer]:
    graph = engine.bundle.manifest.graphs["target"]
    return {spec.name: engine.allocate(spec.dtype, sized(spec, SIZES)) for spec in (*graph.inputs, graph.outputs[0])}


def test_a_call_updates_the_caches_in_place(engine: OnnxRuntimeEngine) -> None:
    buffers = target_buffers(engine)
    buffers["input_ids"].write([[104, 101, 114]])
    buffers["cache_lengths"].write(5)
    buffers["logit_rows"].write(2)
    call = engine.bind("target", buffers)
    call.run()
    key = buffers["past_key_values.0.key"].read()
    written = np.flatnonzero(np.abs(key[0]).sum(axis=(0, 2)))
    assert written.tolist() == [5, 6, 7]
    first = buffers["logits"].read().copy()
    assert np.isfinite(first).all() and np.abs(first).max() > 0
    buffers["input_ids"].write([[1, 2, 3]])  # what changes between runs is only the buffers' content
    call.run()
    assert not np.array_equal(buffers["logits"].read(), first)


def test_buffers_start_at_zero_and_broadcast_what_is_written(engine: OnnxRuntimeEngine) -> None:
    buffer = engine.allocate("float32", (2, 3))
    assert (buffer.dtype, buffer.shape, buffer.read().sum()) == ("float32", (2, 3), 0)
    buffer.write(0.5)
    assert (buffer.read() == 0.5).all()
    with pytest.raises(ValueError, match="could not broadcast"):
        buffer.write([1.0, 2.0])


def test_an_output_without_a_buffer_is_not_delivered(engine: OnnxRuntimeEngine) -> None:
    buffers = target_buffers(engine)
    del buffers["logits"]
    engine.bind("target", buffers).run()
    assert buffers["past_key_values.0.key"].read().any()


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "problem"),
    [
        ("input_ids", None, (), "no buffer is bound to the input 'input_ids'"),
        ("input_ids", "int32", (1, 3), "'input_ids' is bound to int32 [1, 3], expected int64 ['batch', 'width']"),
        ("input_ids", "int64", (3,), "'input_ids' is bound to int64 [3], expected int64"),
        ("cache_lengths", "int64", (2,), "'cache_lengths' is bound to int64 [2], expected int64 [1]"),
        ("logits", "float32", (1, 2, 260), "'logits' is bound to float32 [1, 2, 260], expected float32 [1, 1, 260]"),
        ("past_key_values.3.key", "float32", (1, 2, 8, 16), "expected float32 [1, 2, 256, 16]"),
        ("no_such_input", "int64", (1,), "no input or output is called no_such_input"),
    ],
)
def test_what_does_not_fit_is_refused(
    engine: OnnxRuntimeEngine, name: str, dtype: str | None, shape: tuple[int, ...], problem: str
) -> None:
    buffers = target_buffers(engine)
    if dtype is None:
        del buffers[name]
    else:
        buffers[name] = engine.allocate(dtype, shape)
    with pytest.raises(EngineError) as raised:
        engine.bind("target", buffers)
    assert problem in str(raised.value)


def test_a_buffer_of_another_engine_is_refused(engine: OnnxRuntimeEngine) -> None:
    buffers = target_buffers(engine)
    foreign: Any = SimpleNamespace(dtype="int64", shape=(1,))
    with pytest.raises(EngineError, match="a buffer of another engine"):
        engine.bind("target", {**buffers, "cache_lengths": foreign})


def test_a_failing_run_is_an_engine_error(engine: OnnxRuntimeEngine) -> None:
    buffers = target_buffers(engine)
    buffers["input_ids"].write(260)  # outside the vocabulary; the runtime never sends it
    with pytest.raises(EngineError, match="target: ONNX Runtime failed"):
        engine.bind("target", buffers).run()


def test_unknown_types_and_thread_counts_are_refused(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(EngineError, match="buffers of type bfloat16 are not supported"):
        engine.allocate("bfloat16", (1,))
    with pytest.raises(InvalidInputError, match="threads is 0"):
        OnnxRuntimeEngine(engine.bundle, threads=0)


def test_bfloat16_bundles_need_a_gpu(bundle: Bundle) -> None:
    manifest = dataclasses.replace(bundle.manifest, precision="bf16")
    with pytest.raises(EngineError, match="no bfloat16 kernels on the CPU"):
        OnnxRuntimeEngine(dataclasses.replace(bundle, manifest=manifest))


def test_an_old_onnx_runtime_is_told_what_to_do(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = dataclasses.replace(bundle.manifest, lowering="ort")
    monkeypatch.setattr("onnxruntime.__version__", "1.23.2")
    with pytest.raises(EngineError, match=r"needs 1\.29\.1; upgrade onnxruntime, or export with --lowering decomposed"):
        OnnxRuntimeEngine(dataclasses.replace(bundle, manifest=manifest))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_low_bit_weights_need_a_newer_onnx_runtime(
    bundle: Bundle, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = dataclasses.replace(bundle.manifest, precision=precision)
    monkeypatch.setattr("onnxruntime.__version__", "1.22.0")
    with pytest.raises(EngineError, match=f"cannot run {precision} weights, which need 1.23; upgrade onnxruntime"):
        OnnxRuntimeEngine(dataclasses.replace(bundle, manifest=manifest))


def test_weights_of_4_bits_meet_activations_as_they_are(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """DequantizeLinear and MatMul are fused, which would round activations to int8 unless told otherwise."""
    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 29):
        pytest.skip("the `onnx` lowering needs ONNX Runtime 1.29.1")
    quantized = Bundle.open(bundle.path.with_name("qwen3_rnn_w4a16"))

    def logits() -> HostArray:
        with OnnxRuntimeEngine(quantized, threads=1) as engine:
            buffers = target_buffers(engine)
            buffers["input_ids"].write([[104, 101, 114]])
            buffers["logit_rows"].write(2)
            engine.bind("target", buffers).run()
            return buffers["logits"].read().copy()

    class AsWritten(onnxruntime.SessionOptions):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL

    fused = logits()
    monkeypatch.setattr(onnxruntime, "SessionOptions", AsWritten)
    expected = logits()
    assert np.abs(fused - expected).max() < 2e-3 * np.abs(expected).max()


def test_a_damaged_graph_is_named(bundle: Bundle, tmp_path: Path) -> None:
    damaged = tmp_path / "bundle"
    damaged.mkdir()
    for file in bundle.path.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    size = (damaged / "target.onnx").stat().st_size
    (damaged / "target.onnx").write_bytes(b"\xff" * size)
    with (
        OnnxRuntimeEngine(Bundle.open(damaged)) as engine,
        pytest.raises(EngineError, match=r"cannot load target\.onnx"),
    ):
        engine.bind("target", target_buffers(engine))


def test_closing_twice_is_allowed(bundle: Bundle) -> None:
    engine = OnnxRuntimeEngine(bundle)
    engine.close()
    engine.close()
