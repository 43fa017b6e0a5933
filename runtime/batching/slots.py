"""The caches of all slots: one allocation a tensor, a row a sequence.

Which slot holds whose sequence, and how much of it is valid, are numbers that others keep.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy.typing as npt

from dspark_edge.engines.engine import Buffer, Engine
from dspark_edge.engines.manifest import GraphSpec, TensorSpec
from dspark_edge.runtime.batching.windows import exchange_rows, row_window
from dspark_edge.runtime.model import Caches

__all__ = ["SlotCaches"]


class SlotCaches:
    """Key/value buffers [slots, heads, capacity, head size] of target and drafter.

    All slots have one capacity. Where the bundle leaves it open it starts small and doubles for all when one sequence
    needs it.

    Args:
        engine: allocates them.
        slots: sequences.
    """

    def __init__(self, engine: Engine, slots: int) -> None:
        self._engine = engine
        self._caches = Caches(engine, engine.bundle.manifest.limits.capacity, slots)
        self._windows: dict[tuple[str, int, int], Buffer] = {}
        self._unread: dict[tuple[str, tuple[int, ...]], Buffer] = {}  # by type and shape; for packed calls
        self._spares: dict[tuple[str, tuple[int, ...]], Buffer] = {}  # by type and shape; for exchanges
        self._windows_version = self._caches.version

    @property
    def version(self) -> int:
        """Changes when windows become void, and with them the calls that are bound to them."""
        return self._caches.version

    @property
    def capacity(self) -> int:
        """Slots of each row at present, tokens."""
        return self._caches.capacity

    def ensure(self, length: int) -> None:
        """Make room for `length` tokens in every row, keeping what is cached."""
        self._caches.ensure(length)

    def write(self, values: Callable[[tuple[int, ...]], npt.ArrayLike]) -> None:
        """Overwrite all that is cached by what `values` gives for each buffer's shape."""
        for buffer in self._caches.buffers.values():
            buffer.write(values(buffer.shape))

    def holds(self, name: str) -> bool:
        """Whether a graph's input is one of the caches."""
        return name in self._caches.buffers

    def rows(self, graph: GraphSpec, first: int, count: int) -> dict[str, Buffer]:
        """The windows on `count` rows that a graph takes as its caches.

        A packed graph takes them one by one; its sequences that are not there get a short row that nobody reads.
        """
        taken = {}
        for spec in graph.inputs:
            name, _, place = spec.name.rpartition(".")
            if self.holds(spec.name):
                taken[spec.name] = self._window(spec.name, first, count)
            elif self.holds(name):
                there = int(place) < count
                taken[spec.name] = self._window(name, first + int(place), 1) if there else self._unread_row(spec)
        return taken

    def exchange(self, one: int, other: int, lengths: tuple[int, int]) -> None:
        """Exchange two rows' content, as far as it is valid (`lengths`; 0: free)."""
        for buffer in self._caches.buffers.values():
            key = (buffer.dtype, buffer.shape[2:])
            spare = self._spares.get(key)
            if spare is None:
                spare = self._spares[key] = self._engine.allocate(*key)
            exchange_rows(self._engine, buffer, spare, one, other, lengths)

    def _window(self, name: str, first: int, count: int) -> Buffer:
        if self._windows_version != self.version:
            self._windows.clear()
            self._spares.clear()
            self._windows_version = self.version
        key = (name, first, count)
        if key not in self._windows:
            self._windows[key] = row_window(self._engine, self._caches.buffers[name], first, count)
        return self._windows[key]

    def _unread_row(self, spec: TensorSpec) -> Buffer:
        """For a sequence that is not there. The graph writes a token to it, or a block, and reads it back."""
        tokens = self._engine.bundle.manifest.drafter.block_size + 1
        shape = tuple(tokens if isinstance(size, str) else size for size in spec.shape)
        key = (spec.dtype, shape)
        if key not in self._unread:
            self._unread[key] = self._engine.allocate(*key)
        return self._unread[key]
