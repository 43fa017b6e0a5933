"""The blocks of GGUF's 4- and 8-bit types: the numbers, scales and offsets that a file holds.

Layouts after llama.cpp's `ggml-common.h`; `tests/exporter/test_gguf_blocks.py` compares each with what the gguf package
makes of the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dspark_edge.exporter.stored_blocks import BlockForm, StoredBlocks

__all__ = ["block_form", "read_blocks"]

Bytes = npt.NDArray[np.uint8]

_BLOCK = 32


def _halves(packed: Bytes) -> Bytes:
    """Bytes [n, 16 or 32] → numbers of 4 bits, [n, twice that]: all lower halves come before all upper ones."""
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _floats(stored: Bytes) -> npt.NDArray[np.float32]:
    """Bytes [n, 2] of a float16 → [n, 1]."""
    return np.ascontiguousarray(stored).view("<f2").astype(np.float32)


def _q4_0(blocks: Bytes) -> tuple[Bytes, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """A scale and 32 numbers around 8."""
    scale = _floats(blocks[:, :2])
    return _halves(blocks[:, 2:]), scale, -8 * scale


def _q4_1(blocks: Bytes) -> tuple[Bytes, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """A scale, an offset and 32 numbers."""
    return _halves(blocks[:, 4:]), _floats(blocks[:, :2]), _floats(blocks[:, 2:4])


def _q8_0(blocks: Bytes) -> tuple[Bytes, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """A scale and 32 signed numbers; flipping the sign bit adds 128."""
    scale = _floats(blocks[:, :2])
    return blocks[:, 2:] ^ 128, scale, -128 * scale


def _q4_k(blocks: Bytes) -> tuple[Bytes, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Eight blocks of 32, whose scales and offsets are numbers of 6 bits times a float each."""
    scale, step = _floats(blocks[:, :2]), _floats(blocks[:, 2:4])
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6 << 4)), axis=1)  # [n, 8]
    offsets = np.concatenate((second & 63, (third >> 4) | (second >> 6 << 4)), axis=1)
    numbers = _halves(blocks[:, 16:].reshape(-1, _BLOCK))  # of two blocks each
    return numbers, scale * scales, -(step * offsets)


_READERS: Mapping[str, tuple[BlockForm, Callable[[Bytes], tuple[Any, Any, Any]]]] = {
    "Q4_0": (BlockForm(4, _BLOCK, True), _q4_0),
    "Q4_1": (BlockForm(4, _BLOCK, False), _q4_1),
    "Q4_K": (BlockForm(4, _BLOCK, False), _q4_k),
    "Q8_0": (BlockForm(8, _BLOCK, True), _q8_0),
}
"""Types that ONNX Runtime's operators can hold: blocks of one size, with numbers of as many bits."""


def block_form(kind: str) -> BlockForm | None:
    """What blocks a type has; None where they are no such blocks."""
    entry = _READERS.get(kind)
    return None if entry is None else entry[0]


def read_blocks(kind: str, data: Bytes, shape: tuple[int, ...]) -> StoredBlocks:
    """A matrix of one of these types.

    Args:
        kind: GGUF's name of the type.
        data: as it lies in the file, [N, bytes of a row].
        shape: [N, K].
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    rows, size = shape
    _, bytes_of_a_block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    numbers, scales, offsets = _READERS[kind][1](np.ascontiguousarray(data).reshape(-1, bytes_of_a_block))
    per_row = size // _BLOCK
    return StoredBlocks(numbers.reshape(rows, size), scales.reshape(rows, per_row), offsets.reshape(rows, per_row))
