"""Rows of buffers.

Caches, logits and drafts of all slots are one allocation each. A call for some neighbouring slots is bound to their
part of it; nothing is copied into a batch, or out of one, but where an engine wants memory to begin at a multiple of
some bytes and a row does not.
"""

from __future__ import annotations

from math import prod

from dspark_edge.engines.engine import Buffer, Engine, item_size

__all__ = ["InputRows", "exchange_rows", "row_window"]


def row_window(engine: Engine, buffer: Buffer, first: int, count: int) -> Buffer:
    """Rows `first` … `first + count − 1` of the buffer's first dimension.

    Raises:
        EngineError: the engine has no such window.
    """
    inner = buffer.shape[1:]
    return engine.window(buffer, (count, *inner), first * prod(inner))


class InputRows:
    """Rows of a buffer as a graph's input: a window, or a copy where the engine has no window that begins there.

    Args:
        engine: has the buffer.
        source: the buffer.
        first: the first row.
        shape: that the rows from there are to have, [rows, …] or one of as many elements.
    """

    def __init__(self, engine: Engine, source: Buffer, first: int, shape: tuple[int, ...]) -> None:
        self._engine, self._source = engine, source
        self._start, self._count = first * prod(source.shape[1:]), prod(shape)
        self._copied = self._start * item_size(source.dtype) % engine.alignment != 0
        if self._copied:
            self.buffer = engine.allocate(source.dtype, shape)
        else:
            self.buffer = engine.window(source, shape, self._start)

    def refresh(self) -> None:
        """Bring a copy up to date; before every run."""
        if self._copied:
            self._engine.copy(self._source, self._start, self.buffer, 0, self._count)


def exchange_rows(
    engine: Engine, buffer: Buffer, spare: Buffer, one: int, other: int, lengths: tuple[int, int]
) -> None:
    """Exchange what two rows of a cache [B, H, C, D] hold.

    Args:
        spare: [C, D] of the same type; is overwritten.
        one, other: the rows.
        lengths: valid cache slots of each; what is behind them is not moved. 0: the row is free.
    """
    _, heads, capacity, size = buffer.shape
    of_one, of_other = (length * size for length in lengths)
    for head in range(heads):
        first, second = ((row * heads + head) * capacity * size for row in (one, other))
        if of_one:
            engine.copy(buffer, first, spare, 0, of_one)
        if of_other:
            engine.copy(buffer, second, buffer, first, of_other)
        if of_one:
            engine.copy(spare, 0, buffer, second, of_one)
