"""Calls of a loaded TensorRT engine, and CUDA graphs of them.

A call is bound to fixed addresses and shapes. Its first run is enqueued piece by piece, which loads kernels; its second
is captured, and from then on it is one launch of a CUDA graph, the copies of its small results to the host among it.
`run` does not wait: reading a result does.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dspark_edge.engines.errors import EngineError
from dspark_edge.engines.tensorrt.buffers import DeviceBuffer, DeviceWindow
from dspark_edge.engines.tensorrt.cuda import CudaGraph, Stream
from dspark_edge.engines.tensorrt.profiles import ShapeProfile

__all__ = ["Context", "LoadedEngine", "TensorRTCall"]

# Where several profiles admit a shape, the one whose kernels were chosen for it.
_PREFERRED = ("decode", "verify", "prefill", "draft", "accept")


@dataclass(slots=True)
class Context:
    """An execution context, and the call whose shapes and addresses it has."""

    context: Any
    owner: object = None


@dataclass(slots=True)
class LoadedEngine:
    """A graph's engine on the device."""

    role: str
    engine: Any
    profiles: tuple[ShapeProfile, ...]  # in the engine's order
    scratch: int  # address of the memory that contexts share
    scratch_size: int  # bytes
    config: Any  # TensorRT for RTX: how contexts run; None elsewhere
    weights: Mapping[str, int] = field(default_factory=dict)  # inputs that are bound to addresses for good
    contexts: dict[int, Context] = field(default_factory=dict)  # by profile

    def profile(self, sizes: Mapping[str, int]) -> int | None:
        """The number of the profile that is meant for these sizes; None where none admits them."""
        fitting = [
            (_PREFERRED.index(profile.name) if profile.name in _PREFERRED else len(_PREFERRED), index)
            for index, profile in enumerate(self.profiles)
            if all(
                profile.least[name] <= size <= profile.most[name]
                for name, size in sizes.items()
                if name in profile.least
            )
        ]
        return min(fitting)[1] if fitting else None


class TensorRTCall:
    """A graph bound to buffers."""

    def __init__(
        self,
        stream: Stream,
        loaded: LoadedEngine,
        context: Context,
        log: Any,
        shapes: Mapping[str, tuple[int, ...]],
        inputs: Mapping[str, DeviceBuffer | DeviceWindow],
        outputs: Mapping[str, DeviceBuffer | DeviceWindow],
    ) -> None:
        self._stream, self._loaded, self._context, self._log = stream, loaded, context, log
        self._shapes = shapes
        # Sizes that shapes depend on are read by TensorRT on the host, when a run is enqueued.
        self._on_host = {name for name in inputs if loaded.engine.is_shape_inference_io(name)}
        bound = {
            name: buffer.host_pointer if name in self._on_host else buffer.pointer
            for name, buffer in (*inputs.items(), *outputs.items())
        }
        self._addresses = {**bound, **loaded.weights}
        self._inputs = tuple(inputs.values())
        given = {id(buffer) for buffer in self._inputs}
        self._results = tuple(one for one in outputs.values() if one.small and id(one) not in given)
        results = {id(buffer) for buffer in self._results}
        self._changed = tuple(one for one in outputs.values() if id(one) not in results)
        self._capturable = not self._on_host
        self._warm = False
        self._graph: CudaGraph | None = None
        self._release: Callable[[], object] = lambda: None

    def run(self) -> None:
        """Enqueue; reading a result waits for it."""
        if self._graph is not None:
            number = self._stream.launch(self._graph)
        elif self._warm and self._capturable:
            number = self._capture()
        else:
            number = self._enqueue()
            self._warm = True
        for buffer in self._inputs:
            buffer.used(number, written=False, fetched=False)
        for buffer in self._changed:
            buffer.used(number, written=True, fetched=False)
        for buffer in self._results:
            buffer.used(number, written=True, fetched=True)

    @property
    def captured(self) -> bool:
        """Whether runs are launches of a CUDA graph."""
        return self._graph is not None

    def free(self) -> None:
        """Give up the captured graph."""
        self._graph = None
        self._release()

    def _capture(self) -> int:
        """Capture a run and launch it; what cannot be captured is enqueued, now and from now on."""
        self._prepare()
        ready = getattr(self._context.context, "is_stream_capturable", None)  # of TensorRT for RTX
        if ready is None or ready(self._stream.handle):
            try:
                with self._stream.capture() as captured:
                    self._enqueue()
            except EngineError:
                pass
            else:
                self._graph = captured[0]
                self._release = weakref.finalize(self, self._stream.destroy, self._graph)
                return self._stream.launch(self._graph)
        self._capturable = False
        return self._enqueue()

    def _enqueue(self) -> int:
        self._prepare()
        self._log.clear()
        if not self._context.context.execute_async_v3(self._stream.handle):
            raise EngineError(f"{self._loaded.role}: TensorRT failed: {self._log.reason()}")
        self._stream.add()
        for buffer in self._results:
            buffer.fetch()
        return self._stream.put

    def _prepare(self) -> None:
        """Give the context this call's shapes and addresses, if it has another's or shapes depend on values."""
        if self._context.owner is self and not self._on_host:
            return
        context = self._context.context
        self._context.owner = None
        for name, shape in self._shapes.items():
            if not context.set_input_shape(name, shape):
                raise EngineError(f"{self._loaded.role}: TensorRT refuses {list(shape)} for {name}: {self._log.text()}")
        for name, address in self._addresses.items():
            if not context.set_tensor_address(name, address):
                raise EngineError(f"{self._loaded.role}: TensorRT refuses the address of {name}: {self._log.text()}")
        self._context.owner = self
