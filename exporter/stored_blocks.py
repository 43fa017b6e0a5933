"""Weights that a checkpoint has in blocks already, as it has them.

A model that comes in 4 or 8 bits has been rounded once. Rounding it again to other steps costs as much again, and is
not needed: the blocks of llama.cpp's 4- and 8-bit types are those of ONNX Runtime's operators but for one thing. There
a weight is number · scale + offset, with any offset; here it is (number − zero point) · scale, with a whole zero point.
`exporter.quantization` makes up for the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["BlockForm", "StoredBlocks"]


class BlockForm(NamedTuple):
    """What a checkpoint's blocks are like."""

    bits: int
    block_size: int  # weights of a row that share scale and offset
    centred: bool  # whether every offset is −2^(bits − 1) · scale: a whole zero point says all of it


@dataclass(frozen=True, slots=True)
class StoredBlocks:
    """A matrix [N, K] in blocks along its rows: weight = number · scale + offset of its block."""

    numbers: npt.NDArray[np.uint8]  # [N, K]
    scales: npt.NDArray[np.float32]  # [N, K / block size]
    offsets: npt.NDArray[np.float32]  # [N, K / block size]

    def values(self) -> npt.NDArray[np.float32]:
        """The matrix [N, K]."""
        rows, blocks = self.scales.shape
        numbers = self.numbers.reshape(rows, blocks, -1).astype(np.float32)
        return (numbers * self.scales[..., None] + self.offsets[..., None]).reshape(rows, -1)

    def rows(self, index: npt.NDArray[np.int64]) -> StoredBlocks:
        """Some of its rows, in that order."""
        return StoredBlocks(self.numbers[index], self.scales[index], self.offsets[index])
