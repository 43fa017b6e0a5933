"""The TensorRT engine: a bundle's built engines on a GPU, for both flavours.

Per graph there is one engine, with a context for each optimisation profile; contexts of a graph share their scratch
memory, since all work is in one stream. What is bound runs as `calls` says.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Buffer, check_binding, check_window, item_size, sized
from dspark_edge.engines.errors import BundleError, EngineError
from dspark_edge.engines.manifest import GraphSpec
from dspark_edge.engines.replace_file import replace_file
from dspark_edge.engines.tensorrt.buffers import ALIGNMENT, DeviceBuffer, DeviceWindow
from dspark_edge.engines.tensorrt.calls import Context, LoadedEngine, TensorRTCall
from dspark_edge.engines.tensorrt.cuda import Cuda, Stream, open_cuda
from dspark_edge.engines.tensorrt.flavour import Flavour, load_flavour
from dspark_edge.engines.tensorrt.logs import make_log
from dspark_edge.engines.tensorrt.records import EngineRecord, engine_folder, rebuild_command
from dspark_edge.engines.tensorrt.shared_weights import SharedWeights

__all__ = ["TensorRTEngine"]

_RUNTIME_CACHE = "runtime.cache"


class TensorRTEngine:
    """Runs a bundle's TensorRT engines.

    Args:
        bundle: with engines built by `dspark-edge build`.
        backend: "tensorrt" or "tensorrt-rtx".
        flavour, cuda: imported and opened here where they are None.

    Raises:
        MissingDependencyError: TensorRT or cuda-python is not installed.
        EngineError: there is no GPU, or no engines that run on it; the message has the command that builds them.
        BundleError: the record of the engines is damaged.
    """

    def __init__(self, bundle: Bundle, backend: str, flavour: Flavour | None = None, cuda: Cuda | None = None) -> None:
        self._bundle, self._backend = bundle, backend
        self._flavour = load_flavour(backend) if flavour is None else flavour
        self._cuda = open_cuda(backend) if cuda is None else cuda
        self._flavour.check_device(self._cuda.compute_capability)
        self._record, self._folder = self._find_engines()
        self._log = make_log(self._flavour.trt)
        self._runtime = self._flavour.trt.Runtime(self._log)
        self._stream = self._cuda.stream()
        self._weights = SharedWeights(bundle, self._cuda, self._stream)
        self._kernels: Any = None  # TensorRT for RTX: what it has compiled, for the next start
        self._engines: dict[str, LoadedEngine] = {}
        # Who binds a call keeps it and its buffers; what is still there in the end is given back in `close`.
        self._buffers: weakref.WeakSet[DeviceBuffer] = weakref.WeakSet()
        self._calls: weakref.WeakSet[TensorRTCall] = weakref.WeakSet()
        self._open = True

    @property
    def bundle(self) -> Bundle:
        return self._bundle

    @property
    def stream(self) -> Stream:
        """What all work is put into."""
        return self._stream

    @property
    def cuda(self) -> Cuda:
        return self._cuda

    @property
    def most_rows(self) -> int:
        return self._record.sizes.widest

    @property
    def most_sequences(self) -> int:
        return self._record.sizes.max_batch

    @property
    def few_shapes(self) -> bool:
        return True

    def allocate(self, dtype: str, shape: tuple[int, ...]) -> DeviceBuffer:
        buffer = DeviceBuffer(self._cuda, self._stream, dtype, shape)
        self._buffers.add(buffer)
        return buffer

    @property
    def alignment(self) -> int:
        return ALIGNMENT

    def window(self, buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> DeviceWindow:
        check_window(buffer, shape, start, self.alignment)
        return _own("a window", buffer).window(shape, start)

    def copy(self, source: Buffer, start: int, target: Buffer, to: int, count: int) -> None:
        taken, given, size = _own("a copy", source), _own("a copy", target), item_size(source.dtype)
        number = self._stream.on_device(given.pointer + to * size, taken.pointer + start * size, count * size)
        taken.used(number, written=False, fetched=False)
        given.used(number, written=True, fetched=False)

    def bind(self, role: str, buffers: Mapping[str, Buffer]) -> TensorRTCall:
        loaded = self._engine(role)
        graph = self._bundle.manifest.graphs[role]
        outputs: dict[str, DeviceBuffer | DeviceWindow] = {
            name: _own(role, buffer) for name, buffer in check_binding(role, graph, buffers).items()
        }
        inputs = {spec.name: _own(role, buffers[spec.name]) for spec in graph.inputs}
        sizes = _symbolic_sizes(graph, inputs)
        number = loaded.profile(sizes)
        if number is None:
            given = ", ".join(f"{name} {size}" for name, size in sorted(sizes.items()))
            record = self._record.sizes
            raise EngineError(
                f"{role}: the engine was not built for {given}; it has widths up to {record.widest}, chunks of up to "
                f"{record.prefill_chunk} tokens and up to {record.max_batch} sequences; build it again with other "
                f"--widths, --prefill-chunk or --max-batch: {rebuild_command(self._bundle, self._backend)}"
            )
        for spec in graph.outputs:  # TensorRT delivers all of them
            if spec.name not in outputs:
                outputs[spec.name] = self.allocate(spec.dtype, sized(spec, sizes))
        shapes = {
            spec.name: inputs[spec.name].shape
            for spec in graph.inputs
            if any(isinstance(size, str) for size in spec.shape)
        }
        call = TensorRTCall(self._stream, loaded, self._context(loaded, number), self._log, shapes, inputs, outputs)
        self._calls.add(call)
        return call

    def synchronize(self) -> None:
        self._stream.wait(self._stream.put)

    def close(self) -> None:
        """Give everything on the device back. What TensorRT for RTX has compiled is kept beside the engines."""
        if not self._open:
            return
        self._open = False
        self.synchronize()
        self._keep_kernels()
        for call in [*self._calls]:
            call.free()
        scratches = [loaded.scratch for loaded in self._engines.values()]
        # Contexts go before their engines, and engines before the runtime.
        for loaded in self._engines.values():
            loaded.contexts.clear()
        self._engines.clear()
        for scratch in scratches:
            self._cuda.free(scratch)
        self._weights.free()
        for buffer in [*self._buffers]:
            buffer.free()
        self._stream.close()

    def __enter__(self) -> TensorRTEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _find_engines(self) -> tuple[EngineRecord, Path]:
        """The engines that were built for this GPU, else those for any."""
        capability = self._cuda.compute_capability
        refused: EngineError | None = None
        for folder in self._candidates(capability):
            record = EngineRecord.load(self._bundle, folder)
            if record is None:
                continue
            try:
                record.check(self._bundle, self._backend, self._flavour.version, capability)
            except EngineError as error:
                refused = refused or error
                continue
            return record, self._bundle.path / "devices" / folder
        if refused is not None:
            raise refused
        raise EngineError(
            f"the bundle {self._bundle.path} has no {self._backend} engines; build them with: "
            f"{rebuild_command(self._bundle, self._backend)}"
        )

    def _candidates(self, capability: str) -> list[str]:
        first = [engine_folder(self._backend, (capability,)), engine_folder(self._backend, ())]
        built = self._bundle.path / "devices"
        others = sorted(path.name for path in built.glob(f"{self._backend}-*")) if built.is_dir() else []
        # "tensorrt-…" is also the beginning of "tensorrt-rtx-…".
        others = [name for name in others if self._backend != "tensorrt" or not name.startswith("tensorrt-rtx-")]
        return list(dict.fromkeys([*first, *others]))

    def _engine(self, role: str) -> LoadedEngine:
        loaded = self._engines.get(role)
        if loaded is None:
            loaded = self._engines[role] = self._load(role)
        return loaded

    def _load(self, role: str) -> LoadedEngine:
        file = self._record.engines.get(role)
        rebuild = f"build them again with: {rebuild_command(self._bundle, self._backend)}"
        if file is None:
            raise EngineError(f"there is no engine of {role} among the bundle's; {rebuild}")
        path = self._folder / file.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"cannot read {path}: {error.strerror or error}; {rebuild}") from None
        if len(data) != file.size:
            raise BundleError(f"{path} has {len(data)} bytes, expected {file.size}; {rebuild}")
        self._log.clear()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            reason, free = self._log.reason(), self._cuda.free_memory()[0]
            raise EngineError(
                f"{role}: {self._backend} cannot load {path.name}: {reason}; it takes {file.size / 1e6:.0f} MB of the "
                f"GPU's memory, of which {free / 1e6:.0f} MB are free; if that is enough, {rebuild}"
            )
        size, weights = _scratch_size(engine), self._weights.addresses(role, file.weight_inputs)
        return LoadedEngine(
            role=role,
            engine=engine,
            profiles=file.profiles,
            scratch=self._cuda.allocate(size, f"{role}'s scratch memory"),
            scratch_size=size,
            config=self._runtime_config(engine),
            weights=weights,
        )

    def _context(self, loaded: LoadedEngine, profile: int) -> Context:
        held = loaded.contexts.get(profile)
        if held is not None:
            return held
        self._log.clear()
        strategy = self._flavour.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = loaded.engine.create_execution_context(strategy if loaded.config is None else loaded.config)
        if context is None or not context.set_optimization_profile_async(profile, self._stream.handle):
            raise EngineError(f"{loaded.role}: TensorRT makes no context: {self._log.reason()}")
        self._stream.wait(self._stream.add())
        set_memory = getattr(context, "set_device_memory", None)
        if set_memory is not None:
            set_memory(loaded.scratch, loaded.scratch_size)
        else:  # before TensorRT 10.5 or so
            context.device_memory = loaded.scratch
        held = loaded.contexts[profile] = Context(context)
        return held

    def _runtime_config(self, engine: Any) -> Any:
        """How TensorRT for RTX, which compiles kernels when they are needed, runs an engine; None for the other."""
        if not self._flavour.compiles_late:
            return None
        trt, config = self._flavour.trt, engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # Compiled at once and not behind the first runs: what is captured stays as it is.
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if self._kernels is None:
            self._kernels = config.create_runtime_cache()
            with suppress(OSError):  # there is none yet
                self._kernels.deserialize((self._folder / _RUNTIME_CACHE).read_bytes())
        config.set_runtime_cache(self._kernels)
        return config

    def _keep_kernels(self) -> None:
        """Best effort: without it, the next start compiles again."""
        if self._kernels is None:
            return
        with suppress(BundleError):
            replace_file(self._folder / _RUNTIME_CACHE, bytes(self._kernels.serialize()))


def _own(role: str, buffer: Buffer) -> DeviceBuffer | DeviceWindow:
    if not isinstance(buffer, DeviceBuffer | DeviceWindow):
        raise EngineError(f"{role}: a buffer of another engine was given ({type(buffer).__name__})")
    return buffer


def _symbolic_sizes(graph: GraphSpec, inputs: Mapping[str, DeviceBuffer | DeviceWindow]) -> dict[str, int]:
    """The sizes that a graph's inputs leave open."""
    return {
        size: given
        for spec in graph.inputs
        for size, given in zip(spec.shape, inputs[spec.name].shape, strict=True)
        if isinstance(size, str)
    }


def _scratch_size(engine: Any) -> int:
    """Bytes that an engine's contexts need, whichever profile they have."""
    size = getattr(engine, "device_memory_size_v2", None)
    return int(engine.device_memory_size if size is None else size)
