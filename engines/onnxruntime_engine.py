"""The ONNX Runtime engine: any execution provider, buffers bound in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import NUMPY_DTYPES, Buffer, HostArray, check_binding, check_window
from dspark_edge.engines.errors import EngineError, InvalidInputError, MissingDependencyError
from dspark_edge.engines.machine import probe_processor
from dspark_edge.engines.manifest import ONNX_RUNTIME_PRECISIONS

__all__ = ["PROVIDERS", "OnnxRuntimeEngine"]

PROVIDERS: Mapping[str, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Short names of the providers that bundles are made for."""

_FIRST_NON_CAUSAL = (1, 29, 1)  # GroupQueryAttention's `causal` attribute
_FIRST_LOW_BIT = (1, 23)  # embeddings and products of weights in blocks of 8 bits


@dataclass(frozen=True, slots=True)
class OnnxRuntimeBuffer:
    """Memory that an OrtValue owns or views; on the CPU `array` is that memory itself."""

    value: Any  # onnxruntime.OrtValue
    dtype: str
    shape: tuple[int, ...]
    array: HostArray | None  # None on other devices

    def write(self, values: npt.ArrayLike) -> None:
        if self.array is not None:
            self.array[...] = values
        else:
            host = np.broadcast_to(np.asarray(values, NUMPY_DTYPES[self.dtype]), self.shape)
            self.value.update_inplace(np.ascontiguousarray(host))

    def read(self) -> HostArray:
        if self.array is not None:
            return self.array
        host: HostArray = self.value.numpy()
        return host


class OnnxRuntimeCall:
    """A session's IO binding, made once."""

    __slots__ = ("_binding", "_buffers", "_role", "_run", "_session")

    def __init__(self, role: str, session: Any, binding: Any, buffers: tuple[Buffer, ...]) -> None:
        self._role, self._session, self._binding = role, session, binding
        self._run = session.run_with_iobinding
        self._buffers = buffers  # a binding does not keep its memory alive

    def run(self) -> None:
        try:
            self._run(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            raise EngineError(f"{self._role}: ONNX Runtime failed: {_first_line(error)}") from error


class OnnxRuntimeEngine:
    """Runs a bundle's graphs with ONNX Runtime.

    Args:
        bundle: the bundle.
        provider: "cpu", "cuda", or the full name of an execution provider that shares the CPU's or CUDA's memory.
        threads: threads of each graph on the CPU; None takes all cores this process may use.

    Raises:
        EngineError: ONNX Runtime is too old for the bundle, or lacks the provider.
        MissingDependencyError: ONNX Runtime is not installed.
    """

    def __init__(self, bundle: Bundle, provider: str = "cpu", threads: int | None = None) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependencyError("onnxruntime", "running a bundle") from error
        if threads is not None and threads < 1:
            raise InvalidInputError(f"threads is {threads}, expected at least 1")
        self._bundle = bundle
        self._ort: Any = onnxruntime
        self._provider = PROVIDERS.get(provider, provider)
        self._device = "cuda" if self._provider == PROVIDERS["cuda"] else "cpu"
        self._threads = threads or probe_processor(Path("/")).usable_cores
        self._sessions: dict[str, Any] = {}
        self._check(onnxruntime.get_available_providers(), onnxruntime.__version__)

    @property
    def bundle(self) -> Bundle:
        return self._bundle

    @property
    def most_rows(self) -> None:
        return None

    @property
    def most_sequences(self) -> int | None:
        return None if self._device == "cpu" else 1  # see `window`

    @property
    def few_shapes(self) -> bool:
        return False

    @property
    def threads(self) -> int:
        return self._threads

    def _check(self, available: Sequence[str], version: str) -> None:
        manifest = self._bundle.manifest
        if self._provider not in available:
            raise EngineError(
                f"this ONNX Runtime has no {self._provider}; it has {', '.join(available)}"
                + ("; install it with: pip install 'dspark-edge[cuda]'" if self._device == "cuda" else "")
            )
        if manifest.precision == "bf16" and self._device == "cpu":
            raise EngineError(
                "ONNX Runtime has no bfloat16 kernels on the CPU; export with --precision fp32 for the CPU, "
                "or run the bundle on a GPU"
            )
        number = tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())
        if manifest.precision in ONNX_RUNTIME_PRECISIONS and number < _FIRST_LOW_BIT:
            raise EngineError(
                f"ONNX Runtime {version} cannot run {manifest.precision} weights, which need 1.23; upgrade "
                "onnxruntime, or export with --precision fp32"
            )
        if manifest.lowering == "ort" and manifest.drafter.kind == "dspark" and number < _FIRST_NON_CAUSAL:
            raise EngineError(
                f"ONNX Runtime {version} cannot run a drafter in the 'ort' lowering, which needs 1.29.1; "
                "upgrade onnxruntime, or export with --lowering decomposed"
            )

    def allocate(self, dtype: str, shape: tuple[int, ...]) -> OnnxRuntimeBuffer:
        if dtype not in NUMPY_DTYPES:
            raise EngineError(f"buffers of type {dtype} are not supported with {self._provider}")
        try:
            if self._device == "cpu":
                array = np.zeros(shape, NUMPY_DTYPES[dtype])
                # On the CPU the OrtValue views the array's memory, so reading and writing need no copy.
                value = self._ort.OrtValue.ortvalue_from_numpy(array)
                return OnnxRuntimeBuffer(value, dtype, shape, array)
            value = self._ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, NUMPY_DTYPES[dtype]), self._device, 0)
            return OnnxRuntimeBuffer(value, dtype, shape, None)
        except MemoryError:
            raise EngineError(
                f"not enough memory for a buffer {dtype} {list(shape)}; lower the capacity or the batch"
            ) from None

    @property
    def alignment(self) -> int:
        return 1

    def window(self, buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> OnnxRuntimeBuffer:
        check_window(buffer, shape, start, self.alignment)
        array = self._memory(buffer)[start : start + prod(shape)].reshape(shape)
        return OnnxRuntimeBuffer(self._ort.OrtValue.ortvalue_from_numpy(array), buffer.dtype, shape, array)

    def copy(self, source: Buffer, start: int, target: Buffer, to: int, count: int) -> None:
        self._memory(target)[to : to + count] = self._memory(source)[start : start + count]

    def bind(self, role: str, buffers: Mapping[str, Buffer]) -> OnnxRuntimeCall:
        session = self._session(role)
        graph = self._bundle.manifest.graphs[role]
        outputs = check_binding(role, graph, buffers)
        binding = session.io_binding()
        for spec in graph.inputs:
            binding.bind_ortvalue_input(spec.name, _own(role, buffers[spec.name]).value)
        for name, buffer in outputs.items():
            binding.bind_ortvalue_output(name, _own(role, buffer).value)
        return OnnxRuntimeCall(role, session, binding, (*buffers.values(), *outputs.values()))

    def synchronize(self) -> None:
        """Nothing: a run ends when its results are there."""

    def close(self) -> None:
        self._sessions.clear()

    def __enter__(self) -> OnnxRuntimeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @staticmethod
    def _memory(buffer: Buffer) -> HostArray:
        """A buffer's memory, flat.

        Raises:
            EngineError: it is a device's: ONNX Runtime's Python interface gives no part of it to a graph.
        """
        if not isinstance(buffer, OnnxRuntimeBuffer) or buffer.array is None:
            raise EngineError(
                "ONNX Runtime decodes a batch in memory of this process alone; run the bundle with the provider 'cpu', "
                "with TensorRT engines, or one request at a time"
            )
        return buffer.array.reshape(-1)

    def _session(self, role: str) -> Any:
        session = self._sessions.get(role)
        if session is None:
            session = self._sessions[role] = self._load(role)
        return session

    def _load(self, role: str) -> Any:
        path = self._bundle.graph_path(role)
        options = self._ort.SessionOptions()
        # Products with weights behind DequantizeLinear become MatMulNBits, which would round activations to int8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        # Greedy acceptance takes less time than waking threads for it.
        options.intra_op_num_threads = 1 if role == "sampler_greedy" else self._threads
        if role != "target" or "drafter" in self._bundle.manifest.graphs:
            # Graphs take turns: a pool that spins after its run would steal cores from the next graph's. The target
            # alone keeps its threads awake between tokens.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            return self._ort.InferenceSession(str(path), options, providers=[self._provider])
        except Exception as error:  # see OnnxRuntimeCall.run
            reason = _first_line(error)
            too_old = "opset" in reason.lower() or "Unrecognized attribute" in reason
            hint = "; upgrade onnxruntime, or export with --lowering decomposed" if too_old else ""
            raise EngineError(
                f"ONNX Runtime {self._ort.__version__} cannot load {path.name}: {reason}{hint}"
            ) from error


def _own(role: str, buffer: Buffer) -> OnnxRuntimeBuffer:
    if not isinstance(buffer, OnnxRuntimeBuffer):
        raise EngineError(f"{role}: a buffer of another engine was given ({type(buffer).__name__})")
    return buffer


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
