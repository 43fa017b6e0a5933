"""Windows: a part of a buffer's memory as a buffer of its own.

Caches, logits and drafts of all slots are one allocation each. A call for some neighbouring slots is bound to their
part of it; nothing is copied into a batch, or out of one.
"""

from __future__ import annotations

import math

from dspark_edge.engines.engine import Buffer
from dspark_edge.engines.errors import EngineError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeBuffer

__all__ = ["exchange_rows", "row_window", "window"]


def window(buffer: Buffer, shape: tuple[int, ...], start: int = 0) -> Buffer:
    """The memory of a buffer from one of its elements on, in another shape.

    Args:
        buffer: contiguous, as every engine allocates.
        shape: of the window.
        start: the first element.

    Raises:
        EngineError: the buffer has no host memory that can be viewed, or the window passes its end.
    """
    if not isinstance(buffer, OnnxRuntimeBuffer) or buffer.array is None:
        raise EngineError(
            "decoding a batch needs an engine whose buffers are memory of this process; run the bundle with the "
            "provider 'cpu', or one request at a time"
        )
    flat, size = buffer.array.reshape(-1), math.prod(shape)
    if not 0 <= start <= start + size <= flat.size:
        raise EngineError(
            f"a window of {list(shape)} from element {start} passes the end of a buffer of {list(buffer.shape)}"
        )
    from onnxruntime import OrtValue

    array = flat[start : start + size].reshape(shape)
    return OnnxRuntimeBuffer(OrtValue.ortvalue_from_numpy(array), buffer.dtype, shape, array)


def row_window(buffer: Buffer, first: int, count: int) -> Buffer:
    """Rows `first` … `first + count − 1` of the buffer's first dimension."""
    inner = buffer.shape[1:]
    return window(buffer, (count, *inner), first * math.prod(inner))


def exchange_rows(buffer: Buffer, one: int, other: int, lengths: tuple[int, int]) -> None:
    """Exchange what two rows of a cache [B, H, C, D] hold.

    Args:
        one, other: the rows.
        lengths: valid cache slots of each; what is behind them is not moved. 0: the row is free.
    """
    first, second = row_window(buffer, one, 1).read()[0], row_window(buffer, other, 1).read()[0]
    kept = first[:, : lengths[0]].copy()
    first[:, : lengths[1]] = second[:, : lengths[1]]
    second[:, : lengths[0]] = kept
