"""A GPU, as far as engines need one: memory, a stream, captured graphs. A thin layer over `cuda-python`.

The only module that imports it. Everything is ordered by one stream; `Stream` counts what is put into it, so that
whoever shares memory with the device knows whether it has to wait.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_edge.engines.errors import EngineError, MissingDependencyError

__all__ = ["Cuda", "CudaGraph", "HostMemory", "Stream", "open_cuda"]

_MODULES = ("cuda.bindings.runtime", "cuda.cudart")  # of cuda-python from 12.6 on, and before
_OUT_OF_MEMORY = "cudaErrorMemoryAllocation"
_NO_GPU = ("cudaErrorNoDevice", "cudaErrorInsufficientDriver", "cudaErrorSystemDriverMismatch")
_MAPPED = 2  # cudaHostAllocMapped


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Pinned memory of the host."""

    pointer: int
    device_pointer: int | None  # the device's address of it, where it is mapped
    bytes: npt.NDArray[np.uint8]  # [size], a view of it

    def part(self, begin: int, size: int) -> HostMemory:
        """Some bytes of it."""
        device_pointer = None if self.device_pointer is None else self.device_pointer + begin
        return HostMemory(self.pointer + begin, device_pointer, self.bytes[begin : begin + size])


@dataclass(frozen=True, slots=True)
class CudaGraph:
    """What a stream was given while it was captured."""

    executable: Any


class Cuda:
    """The CUDA runtime on one device. All its errors are `EngineError`s.

    Args:
        runtime: the module of cuda-python.
        index: the device's number.
    """

    def __init__(self, runtime: Any, index: int = 0) -> None:
        self._rt, self._index = runtime, index
        self._call("cudaSetDevice", index)
        attributes = runtime.cudaDeviceAttr
        major, minor, integrated = (
            self._call("cudaDeviceGetAttribute", attribute, index)
            for attribute in (
                attributes.cudaDevAttrComputeCapabilityMajor,
                attributes.cudaDevAttrComputeCapabilityMinor,
                attributes.cudaDevAttrIntegrated,
            )
        )
        self.compute_capability = f"{major}.{minor}"
        self.integrated = bool(integrated)  # shares the host's memory, as in a Jetson

    def allocate(self, size: int, what: str) -> int:
        """The address of zeroed device memory.

        Args:
            size: bytes.
            what: for the message.

        Raises:
            EngineError: there is too little.
        """
        pointer = int(self._call("cudaMalloc", max(1, size), what=f"{what} of {_megabytes(size)}"))
        self._call("cudaMemset", pointer, 0, max(1, size))
        self._call("cudaDeviceSynchronize")  # streams do not wait for it by themselves
        return pointer

    def free(self, pointer: int) -> None:
        self._call("cudaFree", pointer)

    def allocate_host(self, size: int, *, mapped: bool) -> HostMemory:
        """Zeroed pinned memory of the host; mapped: the device can use it, too."""
        pointer = int(self._call("cudaHostAlloc", size, _MAPPED if mapped else 0))
        device_pointer = int(self._call("cudaHostGetDevicePointer", pointer, 0)) if mapped else None
        view = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer))
        view[:] = 0
        return HostMemory(pointer, device_pointer, view)

    def free_host(self, memory: HostMemory) -> None:
        self._call("cudaFreeHost", memory.pointer)

    def free_memory(self) -> tuple[int, int]:
        """Bytes that are free on the device, and all of its memory."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def stream(self) -> Stream:
        return Stream(self, self._call("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking))

    def _call(self, name: str, *arguments: Any, what: str = "") -> Any:
        """Call a function of the runtime; returns what it returns besides its status."""
        status, *values = getattr(self._rt, name)(*arguments)
        if int(status) != 0:
            raise self._error(name, status, what)
        return values[0] if len(values) == 1 else values

    def _error(self, name: str, status: Any, what: str) -> EngineError:
        reason = getattr(status, "name", str(status))
        if reason == _OUT_OF_MEMORY:
            try:
                free, total = self.free_memory()
                left = f"{_megabytes(free)} of {_megabytes(total)} are free"
            except EngineError:
                left = "how much is free is unknown"
            return EngineError(
                f"the GPU has no room for {what or 'what was asked for'}: {left}; end what else uses it, export with "
                "a smaller --capacity, or build for a smaller --max-batch or --prefill-chunk"
            )
        text = self._rt.cudaGetErrorString(status)[1]
        text = text.decode() if isinstance(text, bytes) else text
        return EngineError(f"CUDA failed in {name}: {text} ({reason})")


class Stream:
    """Work of the device in order. Each piece gets a number; `wait` ends when the piece of a number is done."""

    def __init__(self, cuda: Cuda, handle: Any) -> None:
        self._cuda, self._handle = cuda, handle
        self._kinds = cuda._rt.cudaMemcpyKind
        self._capture_mode = cuda._rt.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.handle = int(handle)  # as TensorRT takes it
        self.put = 0  # number of the last piece
        self._done = 0

    def add(self) -> int:
        """Count a piece of work that somebody else put into the stream."""
        self.put += 1
        return self.put

    def to_device(self, pointer: int, memory: HostMemory) -> int:
        """Copy pinned memory to the device; it must not change before that is done."""
        return self._copy(pointer, memory.pointer, memory.bytes.nbytes, self._kinds.cudaMemcpyHostToDevice)

    def to_host(self, memory: HostMemory, pointer: int) -> int:
        return self._copy(memory.pointer, pointer, memory.bytes.nbytes, self._kinds.cudaMemcpyDeviceToHost)

    def on_device(self, to: int, source: int, size: int) -> int:
        """Copy bytes within the device."""
        return self._copy(to, source, size, self._kinds.cudaMemcpyDeviceToDevice)

    def wait(self, number: int) -> None:
        """Wait until a piece of work is done, which takes no time where it is known to be."""
        if number > self._done:
            put = self.put
            self._cuda._call("cudaStreamSynchronize", self._handle)
            self._done = put

    @contextmanager
    def capture(self) -> Iterator[list[CudaGraph]]:
        """What is put into the stream inside becomes a graph, the list's only element, and is not executed."""
        call = self._cuda._call
        found: list[CudaGraph] = []
        call("cudaStreamBeginCapture", self._handle, self._capture_mode)
        try:
            yield found
        except BaseException:
            status, graph = self._cuda._rt.cudaStreamEndCapture(self._handle)
            if int(status) == 0:
                call("cudaGraphDestroy", graph)
            raise
        graph = call("cudaStreamEndCapture", self._handle)
        try:
            found.append(CudaGraph(call("cudaGraphInstantiate", graph, 0)))
        finally:
            call("cudaGraphDestroy", graph)

    def launch(self, graph: CudaGraph) -> int:
        self._cuda._call("cudaGraphLaunch", graph.executable, self._handle)
        return self.add()

    def destroy(self, graph: CudaGraph) -> None:
        self._cuda._call("cudaGraphExecDestroy", graph.executable)

    def mark(self) -> Any:
        """An event behind what has been put into the stream; for `elapsed_s`."""
        event = self._cuda._call("cudaEventCreate")
        self._cuda._call("cudaEventRecord", event, self._handle)
        self.add()
        return event

    def elapsed_s(self, first: Any, second: Any) -> float:
        """Seconds of the device between two marks, which are used up."""
        call = self._cuda._call
        call("cudaEventSynchronize", second)
        milliseconds = call("cudaEventElapsedTime", first, second)
        for event in (first, second):
            call("cudaEventDestroy", event)
        return float(milliseconds) / 1000

    def close(self) -> None:
        self._cuda._call("cudaStreamDestroy", self._handle)

    def _copy(self, to: int, source: int, size: int, kind: Any) -> int:
        self._cuda._call("cudaMemcpyAsync", to, source, size, kind, self._handle)
        return self.add()


def open_cuda(extra: str) -> Cuda:
    """The first GPU.

    Args:
        extra: what installs cuda-python, for the message.

    Raises:
        MissingDependencyError: cuda-python is not installed.
        EngineError: there is no GPU, or its driver is too old for this CUDA.
    """
    runtime = None
    for name in _MODULES:
        try:
            runtime = import_module(name)
            break
        except ImportError:
            continue
    if runtime is None:
        raise MissingDependencyError("cuda-python", "running TensorRT engines", extra)
    status, count = runtime.cudaGetDeviceCount()
    reason = getattr(status, "name", str(status))
    if reason in _NO_GPU or (int(status) == 0 and not count):
        what = "the driver is too old for this CUDA, or there is none" if "Driver" in reason else "none was found"
        raise EngineError(
            f"running TensorRT engines needs an NVIDIA GPU with a current driver: {what}; `dspark-edge doctor` says "
            "what is there, and --engine onnxruntime runs on the CPU"
        )
    if int(status) != 0:
        raise EngineError(f"CUDA cannot be used: {reason}; `dspark-edge doctor` says what is there")
    return Cuda(runtime)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
