"""The engine protocol: what the runtime needs of a backend that executes a bundle's graphs.

A call is bound once per shape and run many times: the runtime writes a few integers into host-visible buffers, runs the
call, and reads a few integers back. Writes, runs and reads of an engine take effect in order; a backend with a device
of its own may put runs into its queue and return, and then reading waits. Buffers are shared between graphs (the
target's logits are the sampler's input), so nothing of vocabulary size is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import EngineError
from dspark_edge.engines.manifest import GraphSpec, TensorSpec

__all__ = [
    "NUMPY_DTYPES",
    "Buffer",
    "Call",
    "Engine",
    "HostArray",
    "check_binding",
    "check_window",
    "checked_buffer",
    "item_size",
    "sized",
]

HostArray = npt.NDArray[Any]


class Buffer(Protocol):
    """Typed memory of an engine, of fixed shape."""

    @property
    def dtype(self) -> str:
        """The manifest's name of the element type, for example "float32"."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def write(self, values: npt.ArrayLike) -> None:
        """Copy values from the host into the buffer; they broadcast to its shape."""

    def read(self) -> HostArray:
        """The content on the host; valid until the next run of a call that writes the buffer."""


class Call(Protocol):
    """A graph bound to buffers."""

    def run(self) -> None:
        """Execute, or have it executed in turn; what is read afterwards has the results.

        Raises:
            EngineError: the backend failed.
        """


class Engine(Protocol):
    """A backend with a bundle's graphs. A context manager; `close` may be called twice."""

    @property
    def bundle(self) -> Bundle: ...

    @property
    def most_rows(self) -> int | None:
        """Most rows of logits that a call of the target can give; None: as many as it has tokens."""

    @property
    def most_sequences(self) -> int | None:
        """Most sequences that can be decoded together; None: any number."""

    @property
    def few_shapes(self) -> bool:
        """Whether a shape is dear when it first comes (kernels are compiled, memory is allocated): calls that may have
        any width, as a prompt's last one, are then padded to one of a few."""

    def allocate(self, dtype: str, shape: tuple[int, ...]) -> Buffer:
        """Zero-filled memory for a graph's input or output.

        Raises:
            EngineError: the type is not supported here, or memory is short.
        """

    @property
    def alignment(self) -> int:
        """Bytes of which the beginning of a window is a multiple."""

    def window(self, buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> Buffer:
        """A part of a buffer's memory as a buffer of its own, in another shape; nothing is copied.

        Args:
            buffer: of this engine.
            shape: of the window.
            start: the first element.

        Raises:
            EngineError: the window passes the buffer's end, does not begin at the engine's alignment, or the engine
                has no windows.
        """

    def copy(self, source: Buffer, start: int, target: Buffer, to: int, count: int) -> None:
        """Copy elements within the engine's memory, in order with runs.

        Args:
            source, target: of one type; may be the same where the ranges do not overlap.
            start, to: the first element in each.
            count: elements.

        Raises:
            EngineError: the engine cannot.
        """

    def bind(self, role: str, buffers: Mapping[str, Buffer]) -> Call:
        """Bind a graph's inputs and outputs to buffers.

        Every input needs one. Outputs that alias an input take its buffer by themselves; other outputs are computed
        into the buffers that are given, and those without one are not delivered.

        Raises:
            EngineError: a buffer is missing or does not fit the contract, or the graph cannot be loaded.
        """

    def synchronize(self) -> None:
        """Wait until all that was run is done; needed where time is taken, not for reading."""

    def close(self) -> None: ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def sized(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """A tensor's shape with its symbolic dimensions filled in."""
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def item_size(dtype: str) -> int:
    """Bytes of an element."""
    return 2 if dtype == "bfloat16" else NUMPY_DTYPES[dtype].itemsize


def check_window(buffer: Buffer, shape: tuple[int, ...], start: int, alignment: int) -> None:
    """Refuse a window that an engine cannot have.

    Raises:
        EngineError: see `Engine.window`.
    """
    if not 0 <= start <= start + prod(shape) <= prod(buffer.shape):
        raise EngineError(
            f"a window of {list(shape)} from element {start} passes the end of a buffer of {list(buffer.shape)}"
        )
    first = start * item_size(buffer.dtype)
    if first % alignment:
        raise EngineError(f"a window begins at byte {first} of a buffer, expected a multiple of {alignment}")


def checked_buffer(spec: TensorSpec, buffer: Buffer, sizes: dict[str, int], where: str) -> Buffer:
    """The buffer, if it fits its tensor's contract; symbolic sizes are collected in `sizes` and must agree.

    Raises:
        EngineError: it does not fit.
    """
    fits = buffer.dtype == spec.dtype and len(buffer.shape) == len(spec.shape)
    for given, expected in zip(buffer.shape, spec.shape, strict=False):
        fits = fits and given == (sizes.setdefault(expected, given) if isinstance(expected, str) else expected)
    if not fits:
        shape = [sizes.get(size, size) if isinstance(size, str) else size for size in spec.shape]
        raise EngineError(
            f"{where}: {spec.name!r} is bound to {buffer.dtype} {list(buffer.shape)}, expected {spec.dtype} {shape}"
        )
    return buffer


def check_binding(role: str, graph: GraphSpec, buffers: Mapping[str, Buffer]) -> dict[str, Buffer]:
    """Buffers of a graph by output name, aliases resolved, after checking all against the contract.

    Raises:
        EngineError: an input has no buffer, a name is unknown, or a type or shape does not fit.
    """
    names = {spec.name for spec in (*graph.inputs, *graph.outputs)}
    unknown = sorted(buffers.keys() - names)
    if unknown:
        raise EngineError(f"{role}: no input or output is called {', '.join(unknown)}")
    sizes: dict[str, int] = {}
    for spec in graph.inputs:
        if spec.name not in buffers:
            raise EngineError(f"{role}: no buffer is bound to the input {spec.name!r}")
        checked_buffer(spec, buffers[spec.name], sizes, role)
    outputs: dict[str, Buffer] = {}
    for spec in graph.outputs:
        source = graph.aliases.get(spec.name)
        buffer = buffers.get(spec.name) if source is None else buffers[source]
        if buffer is not None:
            outputs[spec.name] = checked_buffer(spec, buffer, sizes, role)
    return outputs


NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "bool": np.dtype(np.bool_),
}
"""The types that numpy has, too; bfloat16 is not among them."""
