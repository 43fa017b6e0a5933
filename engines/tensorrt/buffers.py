"""Memory that engines and the host share.

A buffer's content is on the device. What the host writes or reads of it goes through pinned memory of the same size,
which small buffers have from the start and others get when it is needed. On a device that shares the host's memory
(Jetson), small buffers are that pinned memory, and nothing is copied.

Nothing here waits without need: a buffer remembers the number of the last piece of work in the stream that touches its
host memory, and waits for that one alone.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_edge.engines.engine import NUMPY_DTYPES, HostArray
from dspark_edge.engines.errors import EngineError
from dspark_edge.engines.tensorrt.cuda import Cuda, HostMemory, Stream

__all__ = ["SMALL", "DeviceBuffer"]

SMALL = 16 << 10
"""Bytes up to which a buffer is one that the host looks into; what a call writes into it is copied at once."""

_ITEM_SIZES = {**{name: dtype.itemsize for name, dtype in NUMPY_DTYPES.items()}, "bfloat16": 2}


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

    Raises:
        EngineError: the type is unknown, or there is too little memory.
    """

    def __init__(self, cuda: Cuda, stream: Stream, dtype: str, shape: tuple[int, ...]) -> None:
        if dtype not in _ITEM_SIZES:
            raise EngineError(f"buffers of type {dtype} are not supported on the GPU")
        self.dtype, self.shape = dtype, shape
        self._cuda, self._stream = cuda, stream
        self._size = prod(shape) * _ITEM_SIZES[dtype]
        self._shared = cuda.integrated and self.small
        self._busy = 0  # the last piece of work that touches the host memory
        self._stale = False  # whether the device has newer content than the host memory
        self._array: HostArray | None = None
        self._memory = _Memory()
        self._release = weakref.finalize(self, self._memory.free, cuda)
        if not self._shared:
            self._memory.device = cuda.allocate(self._size, f"a buffer {dtype} {list(shape)}")
        if self.small:
            self._pin()
        pointer = self._memory.device
        if pointer is None and self._memory.host is not None:
            pointer = self._memory.host.device_pointer
        if pointer is None:
            raise EngineError("CUDA maps no host memory for the device")
        self.pointer = pointer

    @property
    def small(self) -> bool:
        """Whether results in it are meant for the host."""
        return 0 < self._size <= SMALL

    @property
    def host_pointer(self) -> int:
        """The host memory, for what TensorRT itself wants to read: sizes that shapes depend on."""
        return self._pin().pointer

    def write(self, values: npt.ArrayLike) -> None:
        memory = self._pin()
        self._stream.wait(self._busy)
        self._view()[...] = values
        self._stale = False
        if not self._shared:
            self._busy = self._stream.to_device(self.pointer, memory)

    def read(self) -> HostArray:
        self._pin()
        if self._stale:
            self.fetch()
        self._stream.wait(self._busy)
        return self._view()

    def fetch(self) -> None:
        """Have the content copied to the host; `read` waits for it."""
        if not self._shared:
            self._busy = self._stream.to_host(self._pin(), self.pointer)
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

    def _pin(self) -> HostMemory:
        memory = self._memory.host
        if memory is None:
            memory = self._memory.host = self._cuda.allocate_host(self._size, mapped=self._shared)
            self._stale = not self.small  # what has been written until now is on the device alone
        return memory

    def _view(self) -> HostArray:
        if self._array is None:
            dtype: np.dtype[Any] | None = NUMPY_DTYPES.get(self.dtype)
            if dtype is None:
                raise EngineError(f"a buffer of type {self.dtype} cannot be read or written on the host")
            self._array = self._pin().bytes.view(dtype).reshape(self.shape)
        return self._array
