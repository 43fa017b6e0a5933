"""Memory that engines and the host share.

A buffer's content is on the device. All but large buffers have pinned memory of the same size, through which the host
writes and reads them. Small ones, which hold the integers of a round, are copied there with the call that writes them;
on a device that shares the host's memory (Jetson) they are that pinned memory, and nothing is copied. Large ones are
rarely looked into, and get pinned memory for just so long.

A window is a part of a buffer: its content is the buffer's, and so is what is known of copies to and from the host.

Nothing here waits without need: a buffer remembers the number of the last piece of work in the stream that touches its
host memory, and waits for that one alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_edge.engines.engine import NUMPY_DTYPES, HostArray, item_size
from dspark_edge.engines.errors import EngineError
from dspark_edge.engines.tensorrt.cuda import Cuda, HostMemory, Stream

__all__ = ["ALIGNMENT", "LARGE", "SMALL", "DeviceBuffer", "DeviceWindow"]

SMALL = 16 << 10
"""Bytes up to which a buffer is one that the host looks into; what a call writes into it is copied at once."""

LARGE = 1 << 20
"""Bytes above which a buffer has no pinned memory of its own. What many sequences draw drafts with is below that."""

ALIGNMENT = 256
"""Bytes of which TensorRT wants every tensor's address to be a multiple (its documentation, `setTensorAddress`)."""

_STORED: Mapping[str, np.dtype[Any]] = {**NUMPY_DTYPES, "bfloat16": np.dtype(np.uint16)}


@dataclass(slots=True)
class _Memory:
    """What a buffer has to give back."""

    device: int | None = None  # address
    host: HostMemory | None = None

    def free(self, cuda: Cuda) -> None:
        if self.device is not None:
            cuda.free(self.device)
        if self.host is not None:
            cuda.free_host(self.host)
        self.device = self.host = None


class DeviceBuffer:
    """Typed memory of the GPU, zero-filled; given back when the buffer is collected, or by `free`.

    bfloat16 is float32 to the host.

    Raises:
        EngineError: the type is unknown, or there is too little memory.
    """

    def __init__(self, cuda: Cuda, stream: Stream, dtype: str, shape: tuple[int, ...]) -> None:
        if dtype not in _STORED:
            raise EngineError(f"buffers of type {dtype} are not supported on the GPU")
        self.dtype, self.shape = dtype, shape
        self._cuda, self._stream = cuda, stream
        self._size = prod(shape) * item_size(dtype)
        self._shared = cuda.integrated and self.small
        self._busy = 0  # the last piece of work that touches the host memory
        self._stale = False  # whether the device has newer content than the host memory
        self._memory = _Memory()
        self._release = weakref.finalize(self, self._memory.free, cuda)
        if not self._shared:
            self._memory.device = cuda.allocate(self._size, f"a buffer {dtype} {list(shape)}")
        if 0 < self._size <= LARGE:
            self._memory.host = cuda.allocate_host(self._size, mapped=self._shared)
        pointer = self._memory.device
        if pointer is None and self._memory.host is not None:
            pointer = self._memory.host.device_pointer
        if pointer is None:
            raise EngineError("CUDA maps no host memory for the device")
        self.pointer = pointer
        # Made once: a round writes and reads a dozen of them.
        self._array = self._view(self._memory.host, shape) if self._memory.host is not None else None

    @property
    def small(self) -> bool:
        """Whether the host looks into it in every round."""
        return 0 < self._size <= SMALL

    @property
    def host_pointer(self) -> int:
        """The host memory, for what TensorRT itself wants to read: sizes that shapes depend on.

        Raises:
            EngineError: the buffer is too large for one of those.
        """
        if self._memory.host is None:
            raise EngineError(f"a buffer {self.dtype} {list(self.shape)} has no host memory")
        return self._memory.host.pointer

    def write(self, values: npt.ArrayLike) -> None:
        host = self._memory.host
        if host is None or self._array is None:
            self.write_part(0, self.shape, values)
            return
        self._stream.wait(self._busy)
        self._fill(self._array, values)
        self._stale = False
        if not self._shared:
            self._busy = self._stream.to_device(self.pointer, host)

    def read(self) -> HostArray:
        return self.read_part(0, self.shape) if self._array is None else self._numbers(self._fetched(self._array))

    def write_part(self, first: int, shape: tuple[int, ...], values: npt.ArrayLike) -> None:
        """Write to elements from `first` on, in this shape."""
        begin, host = first * item_size(self.dtype), self._memory.host
        if host is None:
            with self._staging(shape) as staging:
                self._fill(self._view(staging, shape), values)
                self._stream.wait(self._stream.to_device(self.pointer + begin, staging))
            return
        part = host.part(begin, prod(shape) * item_size(self.dtype))
        self._stream.wait(self._busy)
        self._fill(self._view(part, shape), values)
        if not self._shared:  # the other elements may be newer there than here
            self._busy = self._stream.to_device(self.pointer + begin, part)

    def read_part(self, first: int, shape: tuple[int, ...]) -> HostArray:
        """Elements from `first` on, in this shape."""
        begin, host = first * item_size(self.dtype), self._memory.host
        if host is None:
            with self._staging(shape) as staging:
                self._stream.wait(self._stream.to_host(staging, self.pointer + begin))
                return self._numbers(self._view(staging, shape).copy())
        part = host.part(begin, prod(shape) * item_size(self.dtype))
        return self._numbers(self._fetched(self._view(part, shape)))

    def window(self, shape: tuple[int, ...], start: int) -> DeviceWindow:
        """Elements from `start` on, in this shape."""
        return DeviceWindow(self, shape, start)

    def fetch(self) -> None:
        """Have the content copied to the host, but for large buffers; `read` waits for it."""
        if self._memory.host is not None and not self._shared:
            self._busy = self._stream.to_host(self._memory.host, self.pointer)
        self._stale = False

    def used(self, number: int, *, written: bool, fetched: bool) -> None:
        """Note that a piece of work used the buffer.

        Args:
            number: the work's.
            written: whether it changed the content.
            fetched: whether it copied the content to the host as well.
        """
        if self._shared or fetched:
            self._busy = number
        if written:
            self._stale = not (self._shared or fetched)

    def free(self) -> None:
        """Give the memory back; the buffer must not be used again."""
        self._array = None
        self._release()

    def _fetched(self, array: HostArray) -> HostArray:
        """The same array of host memory, when it has what the device has."""
        if self._stale:
            self.fetch()
        self._stream.wait(self._busy)
        return array

    @contextmanager
    def _staging(self, shape: tuple[int, ...]) -> Iterator[HostMemory]:
        """Pinned memory for one copy of so many elements, which has to end inside."""
        memory = self._cuda.allocate_host(max(1, prod(shape) * item_size(self.dtype)), mapped=False)
        try:
            yield memory
        finally:
            self._cuda.free_host(memory)

    def _view(self, memory: HostMemory, shape: tuple[int, ...]) -> HostArray:
        size = prod(shape) * item_size(self.dtype)
        array: HostArray = memory.bytes[:size].view(_STORED[self.dtype]).reshape(shape)
        return array

    def _fill(self, stored: HostArray, values: npt.ArrayLike) -> None:
        if self.dtype != "bfloat16":
            stored[...] = values
            return
        bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
        stored[...] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to the nearest, ties to even

    def _numbers(self, stored: HostArray) -> HostArray:
        if self.dtype != "bfloat16":
            return stored
        return (stored.astype(np.uint32) << 16).view(np.float32)


class DeviceWindow:
    """Some elements of a buffer, in another shape. Keeps the buffer.

    Args:
        buffer: whose they are.
        shape: of the window.
        start: the first element.
    """

    def __init__(self, buffer: DeviceBuffer, shape: tuple[int, ...], start: int) -> None:
        self.dtype, self.shape = buffer.dtype, shape
        self._buffer, self._start = buffer, start
        self._begin = start * item_size(buffer.dtype)
        self.pointer = buffer.pointer + self._begin

    @property
    def small(self) -> bool:
        return self._buffer.small

    @property
    def host_pointer(self) -> int:
        return self._buffer.host_pointer + self._begin

    def write(self, values: npt.ArrayLike) -> None:
        self._buffer.write_part(self._start, self.shape, values)

    def read(self) -> HostArray:
        return self._buffer.read_part(self._start, self.shape)

    def window(self, shape: tuple[int, ...], start: int) -> DeviceWindow:
        return DeviceWindow(self._buffer, shape, self._start + start)

    def fetch(self) -> None:
        self._buffer.fetch()

    def used(self, number: int, *, written: bool, fetched: bool) -> None:
        self._buffer.used(number, written=written, fetched=fetched)
