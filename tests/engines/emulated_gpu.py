"""A GPU that is not there: CUDA's and TensorRT's interfaces on the host's memory, graphs run by ONNX Runtime.

Work that is put into the stream is done when somebody waits for it, and not before: whoever reads too early, or changes
memory that a copy in the stream still needs, gets wrong numbers. Nothing here tells how fast a GPU is, or whether
TensorRT gives the right numbers; it tells whether the engine asks for the right things in the right order.
"""

from __future__ import annotations

import ctypes
import enum
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import NUMPY_DTYPES
from dspark_edge.engines.profile import graphs_digest
from dspark_edge.engines.tensorrt.cuda import Cuda
from dspark_edge.engines.tensorrt.flavour import Flavour
from dspark_edge.engines.tensorrt.profiles import BuildSizes, profiles_of
from dspark_edge.engines.tensorrt.records import SCHEMA_VERSION, EngineFile, EngineRecord, engine_folder

VERSION = "1.7.1"


class Status(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureInvalidated = 901


class EmulatedRuntime:
    """The functions of cuda.bindings.runtime that are used here: each returns its status, and its values behind it."""

    cudaStreamNonBlocking = 1
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major",
        cudaDevAttrComputeCapabilityMinor="minor",
        cudaDevAttrIntegrated="integrated",
    )
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, capability: tuple[int, int] = (8, 7), integrated: bool = False, memory: int = 1 << 30) -> None:
        self.attributes = {"major": capability[0], "minor": capability[1], "integrated": int(integrated)}
        self.memory = memory
        self.device: dict[int, Any] = {}  # address → what lies there
        self.host: dict[int, Any] = {}
        self.queue: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None
        self.graphs: set[int] = set()
        self.calls: Counter[str] = Counter()
        self.refuses_capture = False
        self.devices: tuple[Status, int] = (Status.cudaSuccess, 1)

    def put(self, work: Callable[[], None]) -> None:
        """Put work into the stream, or into the graph that is captured."""
        (self.queue if self.capturing is None else self.capturing).append(work)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cuda") and name[4].isupper():
            object.__getattribute__(self, "calls")[name] += 1
        return object.__getattribute__(self, name)

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        return self.devices

    def cudaSetDevice(self, index: int) -> tuple[Any, ...]:
        return (Status.cudaSuccess,)

    def cudaDeviceGetAttribute(self, attribute: str, index: int) -> tuple[Any, ...]:
        return Status.cudaSuccess, self.attributes[attribute]

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        if size > self._free():
            return Status.cudaErrorMemoryAllocation, None
        memory = ctypes.create_string_buffer(b"\xff" * size, size)
        self.device[ctypes.addressof(memory)] = memory
        return Status.cudaSuccess, ctypes.addressof(memory)

    def cudaMemset(self, pointer: int, value: int, size: int) -> tuple[Any, ...]:
        ctypes.memset(pointer, value, size)
        return (Status.cudaSuccess,)

    def cudaDeviceSynchronize(self) -> tuple[Any, ...]:
        return (Status.cudaSuccess,)

    def cudaFree(self, pointer: int) -> tuple[Any, ...]:
        self._work()
        del self.device[pointer]
        return (Status.cudaSuccess,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        memory = ctypes.create_string_buffer(size)
        self.host[ctypes.addressof(memory)] = memory
        return Status.cudaSuccess, ctypes.addressof(memory)

    def cudaHostGetDevicePointer(self, pointer: int, flags: int) -> tuple[Any, ...]:
        return Status.cudaSuccess, pointer

    def cudaFreeHost(self, pointer: int) -> tuple[Any, ...]:
        self._work()
        del self.host[pointer]
        return (Status.cudaSuccess,)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return Status.cudaSuccess, self._free(), self.memory

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        return Status.cudaSuccess, 7

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        self._work()
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[Any, ...]:
        self.put(lambda: None if not size else ctypes.memmove(to, source, size) and None)
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:
        self.capturing = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, ...]:
        captured, self.capturing = self.capturing, None
        if self.refuses_capture:
            return Status.cudaErrorStreamCaptureInvalidated, None
        return Status.cudaSuccess, captured

    def cudaGraphInstantiate(self, graph: list[Callable[[], None]], flags: int) -> tuple[Any, ...]:
        executable = tuple(graph)
        self.graphs.add(id(executable))
        return Status.cudaSuccess, executable

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, executable: Any) -> tuple[Any, ...]:
        self._work()
        self.graphs.remove(id(executable))
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, executable: tuple[Callable[[], None], ...], stream: int) -> tuple[Any, ...]:
        for work in executable:
            self.put(work)
        return (Status.cudaSuccess,)

    def cudaEventCreate(self) -> tuple[Any, ...]:
        return Status.cudaSuccess, [0]

    def cudaEventRecord(self, event: list[int], stream: int) -> tuple[Any, ...]:
        self.put(lambda: event.__setitem__(0, self.calls["cudaEventRecord"]))
        return (Status.cudaSuccess,)

    def cudaEventSynchronize(self, event: list[int]) -> tuple[Any, ...]:
        self._work()
        return (Status.cudaSuccess,)

    def cudaEventElapsedTime(self, first: list[int], second: list[int]) -> tuple[Any, ...]:
        return Status.cudaSuccess, 0.5  # milliseconds

    def cudaEventDestroy(self, event: list[int]) -> tuple[Any, ...]:
        return (Status.cudaSuccess,)

    def cudaGetErrorString(self, status: Status) -> tuple[Any, ...]:
        return Status.cudaSuccess, status.name.encode()

    def _free(self) -> int:
        return self.memory - sum(len(memory) for memory in self.device.values())

    def _work(self) -> None:
        queue, self.queue = self.queue, []
        for work in queue:
            work()


class _Logger:
    ERROR = 1

    def __init__(self) -> None:
        pass


class _Context:
    """Runs a graph's session on what lies at the addresses when its turn comes."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        return True

    def set_device_memory(self, pointer: int, size: int) -> None:
        self.scratch = (pointer, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        gpu = self._engine.trt.gpu
        blocks = {**gpu.host, **gpu.device}.items()
        # Real allocations begin at multiples of 256 bytes; these do not.
        return any((address - at) % 256 == 0 for at, memory in blocks if at <= address < at + len(memory))

    def is_stream_capturable(self, stream: int) -> bool:
        return self._engine.trt.capturable

    def execute_async_v3(self, stream: int) -> bool:
        engine, gpu = self._engine, self._engine.trt.gpu
        if engine.trt.fails or self.scratch is None or self.scratch[0] not in gpu.device:
            engine.trt.log.log(_Logger.ERROR, "no\n kernel  runs")
            return False
        if not engine.has_weights(self.addresses):
            engine.trt.log.log(_Logger.ERROR, "weights are not where they should be")
            return False
        shapes, addresses = {**engine.fixed, **self.shapes}, dict(self.addresses)
        # What shapes depend on is read at once, on the host.
        early = {"pool": self._view("pool", (1,), addresses).copy()} if "pool" in addresses else {}

        def work() -> None:
            inputs = {
                spec.name: early.get(spec.name, self._view(spec.name, shapes.get(spec.name, spec.shape), addresses))
                for spec in engine.graph.inputs
            }
            names = [spec.name for spec in engine.graph.outputs]
            for name, value in zip(names, engine.session.run(names, inputs), strict=True):
                self._view(name, value.shape, addresses)[...] = value

        gpu.put(work)
        return True

    def _view(self, name: str, shape: Any, addresses: dict[str, int]) -> Any:
        spec = next(spec for spec in (*self._engine.graph.inputs, *self._engine.graph.outputs) if spec.name == name)
        dtype = NUMPY_DTYPES[spec.dtype]
        size = int(np.prod(shape)) * dtype.itemsize
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(addresses[name])).view(dtype).reshape(shape)


class _Engine:
    device_memory_size_v2 = 4096

    def __init__(self, trt: EmulatedTensorRT, role: str) -> None:
        self.trt, self.role, self.graph = trt, role, trt.bundle.manifest.graphs[role]
        self.fixed = {
            spec.name: spec.shape for spec in self.graph.inputs if not any(isinstance(size, str) for size in spec.shape)
        }
        self.session = onnxruntime.InferenceSession(
            str(trt.bundle.graph_path(role)), providers=["CPUExecutionProvider"]
        )

    def has_weights(self, addresses: dict[str, int]) -> bool:
        """Whether what the record says is an input lies at the addresses that were given."""
        self.trt.gpu._work()
        for name, weight in self.trt.bundle.manifest.shared_weights_of(self.role).items():
            data = self.trt.bundle.file(weight.file).read_bytes()[weight.offset : weight.offset + weight.size]
            if ctypes.string_at(addresses[name], weight.size) != data:
                return False
        return True

    def is_shape_inference_io(self, name: str) -> bool:
        return name == "pool"

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(
            set_execution_context_allocation_strategy=lambda strategy: None,
            create_runtime_cache=lambda: self.trt.kernels,
            set_runtime_cache=lambda cache: None,
        )

    def create_execution_context(self, config: Any) -> _Context:
        context = _Context(self)
        self.trt.contexts.append(context)
        return context


class _Kernels:
    """TensorRT for RTX's runtime cache."""

    def __init__(self) -> None:
        self.content = b""

    def deserialize(self, data: bytes) -> None:
        self.content = data

    def serialize(self) -> bytes:
        return self.content + b"+"


class EmulatedTensorRT:
    """The module `tensorrt_rtx`, as far as running engines goes. An engine's file names its graph."""

    ILogger = _Logger
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED=2)
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER=1)

    def __init__(self, gpu: EmulatedRuntime, bundle: Bundle) -> None:
        self.gpu, self.bundle = gpu, bundle
        self.capturable, self.fails = True, False
        self.contexts: list[_Context] = []
        self.kernels = _Kernels()
        self.log: Any = None

    def Runtime(self, log: Any) -> Any:
        self.log = log
        return SimpleNamespace(deserialize_cuda_engine=self._deserialize)

    def _deserialize(self, data: bytes) -> _Engine | None:
        try:
            return _Engine(self, json.loads(data)["role"])
        except ValueError:
            self.log.log(_Logger.ERROR, "magic tag does not match")
            return None


def emulate(
    bundle: Bundle,
    sizes: BuildSizes,
    *,
    backend: str = "tensorrt-rtx",
    capabilities: tuple[str, ...] = (),
    gpu: EmulatedRuntime | None = None,
) -> tuple[Flavour, Cuda, EmulatedRuntime]:
    """Put engines into a bundle, as if they had been built; returns what `TensorRTEngine` takes, and the device."""
    folder: Path = bundle.path / "devices" / engine_folder(backend, capabilities)
    folder.mkdir(parents=True, exist_ok=True)
    engines = {}
    for role in bundle.manifest.graphs:
        data = json.dumps({"role": role}).encode()
        (folder / f"{role}.engine").write_bytes(data)
        profiles = profiles_of(role, bundle.manifest, sizes, compiles_late=backend == "tensorrt-rtx")
        shared = tuple(bundle.manifest.shared_weights_of(role))
        engines[role] = EngineFile(f"{role}.engine", len(data), "0" * 64, profiles, True, shared)
    record = EngineRecord(
        schema_version=SCHEMA_VERSION,
        backend=backend,
        version=VERSION,
        compute_capabilities=capabilities,
        lowering=bundle.manifest.lowering,
        precision=bundle.manifest.precision,
        bundle=graphs_digest(bundle.manifest),
        built_at="2026-11-26T00:00:00Z",
        tool_version="0",
        sizes=sizes,
        engines=engines,
    )
    (folder / "engines.json").write_text(record.to_text())
    gpu = gpu or EmulatedRuntime()
    return Flavour(backend, EmulatedTensorRT(gpu, bundle), VERSION), Cuda(gpu), gpu
