"""The TensorRT engine on a device that is emulated: what it asks for, in which order, and what it gives back."""

from __future__ import annotations

import gc
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Buffer, sized
from dspark_edge.engines.errors import BundleError, EngineError, InvalidInputError, MissingDependencyError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.engines.opening import EngineChoice
from dspark_edge.engines.tensorrt import shared_weights
from dspark_edge.engines.tensorrt.buffers import LARGE, SMALL, DeviceBuffer
from dspark_edge.engines.tensorrt.cuda import Cuda, open_cuda
from dspark_edge.engines.tensorrt.engine import TensorRTCall, TensorRTEngine
from dspark_edge.engines.tensorrt.profiles import BuildSizes
from dspark_edge.engines.tensorrt.shared_weights import SharedWeights
from dspark_edge.runtime.generator import Generator, GeneratorOptions
from dspark_edge.runtime.profile_probe import StreamProbe
from dspark_edge.runtime.sampling import SamplingParams
from tests.engines.emulated_gpu import EmulatedRuntime, Status, emulate

SIZES = BuildSizes(1, 64, (1, 2, 3, 4, 5, 6, 7, 8))
PROMPT = [104, 101, 114, 101, 32, 105, 115]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    kept = Path(__file__).parents[1] / "data" / "bundles" / "qwen3_rnn_decomposed"
    return Bundle.open(shutil.copytree(kept, tmp_path / "bundle"))


def open_engine(bundle: Bundle, **options: Any) -> tuple[TensorRTEngine, EmulatedRuntime, Any]:
    flavour, cuda, gpu = emulate(bundle, SIZES, **options)
    return TensorRTEngine(bundle, flavour.backend, flavour, cuda), gpu, flavour.trt


def bind_target(engine: TensorRTEngine, width: int, start: int = 0) -> tuple[TensorRTCall, dict[str, Buffer]]:
    graph = engine.bundle.manifest.graphs["target"]
    sizes = {"batch": 1, "width": width, "rows": 1}
    buffers: dict[str, Buffer] = {
        spec.name: engine.allocate(spec.dtype, sized(spec, sizes)) for spec in (*graph.inputs, graph.outputs[0])
    }
    buffers["logit_rows"].write(width - 1)
    buffers["cache_lengths"].write(start)
    return engine.bind("target", buffers), buffers


# Whole answers


@pytest.mark.parametrize("integrated", [False, True], ids=["card", "jetson"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_new_tokens=24, temperature=0.0, ignore_eos=True),
        SamplingParams(max_new_tokens=24, temperature=1.0, seed=3, ignore_eos=True),
        SamplingParams(max_new_tokens=24, temperature=0.8, top_k=5, top_p=0.9, seed=3, ignore_eos=True),
    ],
    ids=["greedy", "sampled", "filtered"],
)
@pytest.mark.parametrize("mode", ["plain", "static"])
def test_answers_are_those_of_onnxruntime(bundle: Bundle, mode: str, params: SamplingParams, integrated: bool) -> None:
    options = GeneratorOptions(mode, prefill_chunk=4)  # three calls for the prompt, two of them of one shape
    with Generator(OnnxRuntimeEngine(bundle, threads=1), options) as expected:
        answer = expected.generate(PROMPT, params)
    engine, _, _ = open_engine(bundle, gpu=EmulatedRuntime(integrated=integrated))
    with Generator(engine, options) as generator:
        for _ in range(2):  # the second one by captured graphs from the first token on
            found = generator.generate(PROMPT, params)
            assert found.token_ids == answer.token_ids
            np.testing.assert_allclose(found.log_probs, answer.log_probs, rtol=1e-5)


def test_rounds_allocate_nothing_and_wait_once_for_a_draft_and_once_for_a_verdict(bundle: Bundle) -> None:
    engine, gpu, _ = open_engine(bundle)
    with engine:
        generator, prompt = Generator(engine, GeneratorOptions("static")), PROMPT * 3
        params = SamplingParams(max_new_tokens=60, temperature=0.0, ignore_eos=True)
        for _ in range(3):
            generator.generate(prompt, params)
        gpu.calls.clear()
        rounds = generator.generate(prompt, params).statistics.rounds
        assert rounds > 5
        assert gpu.calls["cudaMalloc"] == gpu.calls["cudaHostAlloc"] == 0
        assert gpu.calls["cudaStreamBeginCapture"] == 0
        assert 3 * rounds <= gpu.calls["cudaGraphLaunch"] <= 3 * rounds + 3  # drafter, target, sampler
        assert gpu.calls["cudaStreamSynchronize"] <= 2 * rounds + 3


def test_prompts_of_any_length_have_few_shapes(bundle: Bundle) -> None:
    engine, gpu, _ = open_engine(bundle)
    options, params = GeneratorOptions("plain", prefill_chunk=32), SamplingParams(max_new_tokens=2)
    with engine, Generator(OnnxRuntimeEngine(bundle, threads=1), options) as expected:
        generator = Generator(engine, options)
        capacity = bundle.manifest.limits.capacity
        for length in (*range(1, 64, 5), capacity - 2, 2):  # the second to last has no room for padding
            prompt = [(7 * place + length) % 250 for place in range(length)]
            assert generator.generate(prompt, params).token_ids == expected.generate(prompt, params).token_ids
        gpu.calls.clear()
        for length in (9, 13, 47):
            generator.generate([length] * length, params)
        assert gpu.calls["cudaMalloc"] == 0
        verifier = generator._verifier
        assert {width for width, _ in verifier._calls} <= {1, 2, 4, 8, 16, 30, 32}


def test_a_profile_waits_for_the_target_before_it_takes_the_time(bundle: Bundle) -> None:
    engine, gpu, _ = open_engine(bundle)
    with engine:
        now = iter(range(1000))

        def clock() -> float:
            assert not gpu.queue or "work" not in str(gpu.queue[-1]), "time is taken while the device still works"
            return float(next(now))

        probe = StreamProbe(engine, 1, 32, clock)
        times = probe.run(16, 4, "sampler_greedy")
        assert times.draft_s is not None and times.target_s > 0 and times.sampler_s > 0


# Calls


def test_the_second_run_is_captured_and_later_ones_are_launched(bundle: Bundle) -> None:
    engine, gpu, _ = open_engine(bundle)
    with engine, OnnxRuntimeEngine(bundle, threads=1) as reference:
        call, buffers = bind_target(engine, 3)
        graph = bundle.manifest.graphs["target"]
        others = {
            spec.name: reference.allocate(spec.dtype, sized(spec, {"batch": 1, "width": 3, "rows": 1}))
            for spec in (*graph.inputs, graph.outputs[0])
        }
        others["logit_rows"].write(2)
        expected = reference.bind("target", others)
        for run in range(4):
            for one in (buffers, others):
                one["input_ids"].write([[run, run + 1, run + 2]])
                one["cache_lengths"].write(3 * run)
            call.run()
            expected.run()
            assert call.captured == (run > 0)
            np.testing.assert_allclose(buffers["logits"].read(), others["logits"].read(), rtol=1e-5, atol=1e-6)
        assert gpu.calls["cudaGraphLaunch"] == 3 and len(gpu.graphs) == 1
        name = "past_key_values.0.key"  # the caches are updated in place, at the address that both names have
        np.testing.assert_allclose(buffers[name].read(), others[name].read(), rtol=1e-5, atol=1e-6)
    assert not gpu.graphs


@pytest.mark.parametrize("how", ["says so", "fails"])
def test_what_cannot_be_captured_is_enqueued(bundle: Bundle, how: str) -> None:
    engine, gpu, trt = open_engine(bundle)
    trt.capturable, gpu.refuses_capture = how != "says so", True
    with engine:
        call, buffers = bind_target(engine, 2)
        found = []
        for _ in range(4):
            buffers["input_ids"].write([[5, 6]])
            call.run()
            found.append(buffers["logits"].read().copy())
        assert not call.captured and all(np.array_equal(found[0], other) for other in found)
        assert gpu.calls["cudaStreamBeginCapture"] == (how == "fails")


@pytest.mark.parametrize(("backend", "contexts"), [("tensorrt", 2), ("tensorrt-rtx", 1)])
def test_calls_of_a_profile_take_turns_in_its_context(bundle: Bundle, backend: str, contexts: int) -> None:
    engine, _, trt = open_engine(bundle, backend=backend)
    with engine:
        wide, wide_buffers = bind_target(engine, 4)
        narrow, narrow_buffers = bind_target(engine, 2)
        single, _ = bind_target(engine, 1)
        assert len(trt.contexts) == contexts  # one row: `prefill` and `decode`; `verify` takes all of them
        results = []
        for call, buffers in ((wide, wide_buffers), (narrow, narrow_buffers), (wide, wide_buffers)):
            buffers["input_ids"].write([[9, 8, 7, 6][: buffers["input_ids"].shape[1]]])
            call.run()
            results.append(buffers["logits"].read().copy())
        assert np.array_equal(results[0], results[2]) and not np.array_equal(results[0], results[1])
        single.run()


def test_a_failing_run_says_what_tensorrt_says(bundle: Bundle) -> None:
    engine, _, trt = open_engine(bundle)
    with engine:
        call, _ = bind_target(engine, 2)
        trt.fails = True
        with pytest.raises(EngineError, match="target: TensorRT failed: no kernel runs"):
            call.run()


@pytest.mark.parametrize(("width", "batch"), [(65, 1), (2, 2)])
def test_shapes_beyond_the_profiles_are_refused_with_what_to_build(bundle: Bundle, width: int, batch: int) -> None:
    engine, _, _ = open_engine(bundle)
    graph = bundle.manifest.graphs["target"]
    with engine:
        sizes = {"batch": batch, "width": width, "rows": 1}
        buffers = {spec.name: engine.allocate(spec.dtype, sized(spec, sizes)) for spec in graph.inputs}
        with pytest.raises(
            EngineError, match=rf"not built for batch {batch}, .*width {width}.* up to 64 tokens.*build"
        ):
            engine.bind("target", buffers)


def test_another_engines_buffers_are_refused(bundle: Bundle) -> None:
    engine, _, _ = open_engine(bundle)
    graph = bundle.manifest.graphs["target"]
    with engine, OnnxRuntimeEngine(bundle, threads=1) as other:
        sizes = {"batch": 1, "width": 1, "rows": 1}
        buffers = {spec.name: other.allocate(spec.dtype, sized(spec, sizes)) for spec in graph.inputs}
        with pytest.raises(EngineError, match="a buffer of another engine"):
            engine.bind("target", buffers)


# Memory


def test_a_buffer_is_not_changed_while_a_copy_needs_it() -> None:
    gpu = EmulatedRuntime()
    cuda = Cuda(gpu)
    stream = cuda.stream()
    first, second = (DeviceBuffer(cuda, stream, "int64", (3,)) for _ in range(2))
    size = 24
    for value in (1, 2):
        first.write(value)
        gpu.cudaMemcpyAsync(second.pointer, first.pointer, size, 1, 7)
        second.used(stream.add(), written=True, fetched=False)
        if value == 1:
            kept = second.read().copy()
    assert kept.tolist() == [1, 1, 1] and second.read().tolist() == [2, 2, 2]
    first.write([7, 8, 9])
    first.write([4, 5, 6])  # waits for the copy of 7, 8, 9
    assert first.read().tolist() == [4, 5, 6]
    assert gpu.calls["cudaStreamSynchronize"] == 4
    first.read()
    assert gpu.calls["cudaStreamSynchronize"] == 4  # nothing to wait for


def test_large_buffers_have_host_memory_while_they_are_looked_into() -> None:
    gpu = EmulatedRuntime()
    cuda = Cuda(gpu)
    large = DeviceBuffer(cuda, cuda.stream(), "float32", (LARGE,))
    assert not large.read().any() and not gpu.host
    large.write(np.arange(LARGE))
    found = large.read()
    assert found[5] == 5 and not gpu.host
    large.write(1)
    assert found[5] == 5  # a copy
    with pytest.raises(EngineError, match="has no host memory"):
        _ = large.host_pointer
    large.free()
    assert not gpu.device
    with pytest.raises(EngineError, match="type complex64 are not supported"):
        DeviceBuffer(cuda, cuda.stream(), "complex64", (2,))


@pytest.mark.parametrize("size", [4, LARGE])
def test_bfloat16_is_float32_to_the_host(size: int) -> None:
    cuda = Cuda(EmulatedRuntime())
    buffer = DeviceBuffer(cuda, cuda.stream(), "bfloat16", (size,))
    values = np.resize(np.array([1.0, -2.5, 3.14159, 1 + 2**-8], np.float32), size)
    buffer.write(values)
    found = buffer.read()
    assert found.dtype == np.float32 and found[:4].tolist() == [1.0, -2.5, 3.140625, 1.0]


@pytest.mark.parametrize("integrated", [False, True], ids=["card", "jetson"])
def test_what_many_sequences_draw_with_is_written_without_waiting(integrated: bool) -> None:
    """Neither small nor large: [32, 7, 64] float32. A call that writes such a buffer does not copy it to the host."""
    gpu = EmulatedRuntime(integrated=integrated)
    cuda = Cuda(gpu)
    noise = DeviceBuffer(cuda, cuda.stream(), "float32", (32, 7, 64))
    gpu.calls.clear()
    noise.write(2.0)
    assert not gpu.calls["cudaStreamSynchronize"] and not gpu.calls["cudaHostAlloc"]
    assert not noise.small and SMALL < 4 * 32 * 7 * 64 < LARGE
    noise.used(noise._stream.add(), written=True, fetched=False)
    assert (noise.read() == 2.0).all() and gpu.calls["cudaMemcpyAsync"] == 2
    noise.free()
    assert not gpu.device and not gpu.host


def test_a_device_that_shares_memory_copies_nothing_small() -> None:
    gpu = EmulatedRuntime(integrated=True)
    cuda = Cuda(gpu)
    buffer = DeviceBuffer(cuda, cuda.stream(), "int64", (2,))
    buffer.write([3, 4])
    assert buffer.read().tolist() == [3, 4] and gpu.calls["cudaMemcpyAsync"] == 0 and not gpu.device


def test_memory_that_is_short_is_named() -> None:
    cuda = Cuda(EmulatedRuntime(memory=4_000_000))
    with pytest.raises(
        EngineError,
        match=r"no room for a buffer float32 \[1000, 2000\] of 8\.0 MB: 4\.0 MB of 4\.0 MB are free; .*--capacity",
    ):
        DeviceBuffer(cuda, cuda.stream(), "float32", (1000, 2000))


def test_what_target_and_drafter_share_is_on_the_device_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated engines run only where it lies at the addresses that they are given."""
    monkeypatch.setattr(shared_weights, "_PIECE", 1000)
    weight = bundle.manifest.shared_weights[0]
    engine, gpu, trt = open_engine(bundle)
    with engine:
        Generator(engine, GeneratorOptions("static")).generate(PROMPT, SamplingParams(max_new_tokens=8))
        pointers = {
            context.addresses[name]
            for context in trt.contexts
            for names in weight.initializers.values()
            for name in names
            if name in context.addresses
        }
        assert len(pointers) == 1
        assert bytes(gpu.device[pointers.pop()]) == bundle.file(weight.file).read_bytes()[: weight.size]
    assert not gpu.device and not gpu.host


def test_shared_weights_that_are_not_there_are_named(bundle: Bundle) -> None:
    engine, gpu, _ = open_engine(bundle)
    with engine:
        weights = SharedWeights(bundle, engine.cuda, engine.stream)
        with pytest.raises(BundleError, match=r"does not say where sampler's embed_tokens\.weight is"):
            weights.addresses("sampler", ["embed_tokens.weight"])
        path = bundle.file("target.onnx.data")
        data = path.read_bytes()
        path.write_bytes(data[:999])
        with pytest.raises(BundleError, match=r"target\.onnx\.data is shorter than the manifest says; export"):
            weights.addresses("target", ["embed_tokens.weight"])
        path.unlink()
        with pytest.raises(BundleError, match=r"target\.onnx\.data"):
            SharedWeights(bundle, engine.cuda, engine.stream).addresses("target", ["embed_tokens.weight"])
        path.write_bytes(data)
        gpu.memory = 100
        with pytest.raises(EngineError, match="no room for weights that target and drafter share"):
            SharedWeights(bundle, engine.cuda, engine.stream).addresses("target", ["embed_tokens.weight"])


def test_all_memory_is_given_back(bundle: Bundle) -> None:
    engine, gpu, _ = open_engine(bundle)
    with engine:
        _, buffers = bind_target(engine, 5)
        before = len(gpu.device)
        call, other = bind_target(engine, 6)
        call.run()
        call.run()
        assert len(gpu.device) > before and len(gpu.graphs) == 1
        del call, other
        engine.synchronize()
        # The context still has the call's addresses until another one takes its turn.
        bind_target(engine, 7)[0].run()
        gc.collect()
        assert not gpu.graphs and len(gpu.device) < 3 * before
        assert buffers
    engine.close()
    gc.collect()
    assert not gpu.device and not gpu.host and not gpu.graphs


# Engines that are not there, or not for this device


def test_engines_for_this_gpu_come_before_those_for_any(bundle: Bundle) -> None:
    emulate(bundle, SIZES)
    flavour, cuda, _ = emulate(bundle, SIZES, capabilities=("8.7",))
    with TensorRTEngine(bundle, "tensorrt-rtx", flavour, cuda) as engine:
        assert engine._folder.name == "tensorrt-rtx-8.7"
    shutil.rmtree(bundle.path / "devices" / "tensorrt-rtx-8.7")
    with TensorRTEngine(bundle, "tensorrt-rtx", flavour, cuda) as engine:
        assert engine._folder.name == "tensorrt-rtx-any"


def test_engines_for_several_gpus_are_found(bundle: Bundle) -> None:
    engine, _, _ = open_engine(bundle, capabilities=("8.6", "8.7"))
    with engine:
        bind_target(engine, 1)[0].run()


def test_what_compiles_late_keeps_its_kernels(bundle: Bundle) -> None:
    for expected in (b"+", b"++"):
        engine, _, _ = open_engine(bundle)
        with engine:
            bind_target(engine, 1)[0].run()
        assert (bundle.path / "devices" / "tensorrt-rtx-any" / "runtime.cache").read_bytes() == expected


@pytest.mark.parametrize(
    ("backend", "options", "expected"),
    [
        (
            "tensorrt",
            {"backend": "tensorrt-rtx"},
            "has no tensorrt engines; build them with: dspark-edge build .* --backend",
        ),
        (
            "tensorrt-rtx",
            {"capabilities": ("8.9",)},
            r"built for compute capability 8\.9, and this GPU has 8\.7; build",
        ),
    ],
)
def test_engines_that_do_not_run_here_are_refused(
    bundle: Bundle, backend: str, options: dict[str, Any], expected: str
) -> None:
    flavour, cuda, _ = emulate(bundle, SIZES, **options)
    with pytest.raises(EngineError, match=expected):
        TensorRTEngine(bundle, backend, flavour, cuda)


def test_files_that_are_damaged_are_named(bundle: Bundle) -> None:
    engine, _, _ = open_engine(bundle)
    folder = bundle.path / "devices" / "tensorrt-rtx-any"
    with engine:
        path = folder / "drafter.engine"
        data = path.read_bytes()
        graph = bundle.manifest.graphs["drafter"]
        buffers = {spec.name: engine.allocate(spec.dtype, sized(spec, {"batch": 1})) for spec in graph.inputs}
        path.write_bytes(b"?" * len(data))
        with pytest.raises(
            EngineError, match=r"cannot load drafter\.engine: magic tag does not match; .*build them again"
        ):
            engine.bind("drafter", buffers)
        path.write_bytes(data[:3])
        with pytest.raises(BundleError, match=r"drafter\.engine has 3 bytes, expected \d+; build them again with"):
            engine.bind("drafter", buffers)
        path.unlink()
        with pytest.raises(BundleError, match=r"cannot read .*drafter\.engine: No such file"):
            engine.bind("drafter", buffers)


# Opening


def test_a_gpu_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = EmulatedRuntime()
    module: Any = ModuleType("cuda.bindings.runtime")
    module.cudaGetDeviceCount = gpu.cudaGetDeviceCount
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", module)
    for devices, expected in (
        ((Status.cudaErrorNoDevice, 0), "needs an NVIDIA GPU .* none was found"),
        ((Status.cudaSuccess, 0), "none was found"),
        ((Status.cudaErrorInsufficientDriver, None), "the driver is too old for this CUDA"),
        ((Status.cudaErrorMemoryAllocation, None), "CUDA cannot be used: cudaErrorMemoryAllocation"),
    ):
        module.cudaGetDeviceCount = lambda devices=devices: devices
        with pytest.raises(EngineError, match=expected):
            open_cuda("tensorrt-rtx")
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(MissingDependencyError, match=r"pip install 'dspark-edge\[tensorrt-rtx\]'"):
        open_cuda("tensorrt-rtx")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"engine": "tensor"}, "unknown engine 'tensor'; choose one of: onnxruntime, tensorrt, tensorrt-rtx"),
        ({"engine": "tensorrt", "provider": "cpu"}, "runs on NVIDIA GPUs, not with the provider 'cpu'"),
        ({"engine": "tensorrt-rtx", "threads": 2}, "takes no threads; leave --threads out"),
    ],
)
def test_an_engine_is_given_only_what_it_takes(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidInputError, match=expected):
        EngineChoice(**given)


def test_choices_name_themselves_and_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from dspark_edge.engines import profile_device

    monkeypatch.setattr(profile_device, "probe_tensorrt", lambda module: SimpleNamespace(version=f"{module} 1.7"))
    assert EngineChoice().name == "onnxruntime cpu" and EngineChoice().on_cpu
    choice = EngineChoice("tensorrt-rtx")
    assert choice.name == "tensorrt-rtx cuda" and not choice.on_cpu
    device = choice.device()
    assert (device.engine, device.provider, device.threads) == ("tensorrt-rtx", "tensorrt-rtx", 1)
    assert device.libraries == {"tensorrt_rtx": "tensorrt_rtx 1.7"}
    assert device.fingerprint != EngineChoice().device().fingerprint


def test_a_gpu_that_tensorrt_for_rtx_does_not_know_is_told_what_runs_there(bundle: Bundle) -> None:
    """Compute capability 9.0 (H100, H200), on which TensorRT for RTX 1.7 was seen to refuse its engines."""
    flavour, cuda, _ = emulate(bundle, SIZES)
    names = {name: name for name in ("NONE", "CURRENT", "SM80", "SM86", "SM89", "SM120", "SM121")}
    flavour.trt.ComputeCapability = SimpleNamespace(__members__=names)
    for capability in ("8.6", "12.1", "13.0"):
        flavour.check_device(capability)
    cuda.compute_capability = "9.0"
    with pytest.raises(
        EngineError, match=r"does not run on this GPU, which has compute capability 9\.0; it does on 8\.0"
    ):
        TensorRTEngine(bundle, "tensorrt-rtx", flavour, cuda)
