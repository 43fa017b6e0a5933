"""Rounding of weights to signed numbers of 4 bits, for DequantizeLinear.

A block's numbers are in −8 … 7, and its scale is positive and a float16. The scale that uses the whole range for the
block's largest weight is not the best one for all others: among a few smaller ones, which clip the largest, the one
with the least squared error is taken (as in llama.cpp's and AWQ's searches; Lin et al. 2023, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["SignedRows", "pack_int4", "round_signed"]

_LEAST, _MOST = -8, 7
_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of the scale that clips nothing
_TINIEST = 2.0**-24  # the least positive float16
_PIECE = 1024  # rows that are rounded at once, as the search holds several copies of them


@dataclass(frozen=True, slots=True)
class SignedRows:
    """A matrix [N, K] in signed blocks: a weight is number · scale."""

    numbers: npt.NDArray[np.int8]  # [N, K]
    scales: npt.NDArray[np.float16]  # [N, blocks]

    def values(self) -> npt.NDArray[np.float32]:
        """The matrix [N, K] that the blocks stand for."""
        count, size = self.numbers.shape
        blocks = self.numbers.reshape(count, self.scales.shape[1], -1).astype(np.float32)
        return (blocks * self.scales.astype(np.float32)[..., None]).reshape(count, size)


def round_signed(rows: npt.NDArray[np.float32], block_size: int) -> SignedRows:
    """Round a matrix [N, K], K whole blocks, to signed blocks. Deterministic, and each row by itself.

    Weights are finite, and within float16: a scale beyond it would be infinite.
    """
    count, size = rows.shape
    if size % block_size:
        raise RuntimeError(f"rows of {size} are not whole blocks of {block_size}")
    numbers = np.empty((count, size), np.int8)
    scales = np.empty((count, size // block_size), np.float16)
    for begin in range(0, count, _PIECE):
        piece = slice(begin, begin + _PIECE)
        blocks = rows[piece].reshape(-1, size // block_size, block_size)
        found, scales[piece] = _round_blocks(blocks)
        numbers[piece] = found.reshape(-1, size)
    return SignedRows(numbers, scales)


def _round_blocks(blocks: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """Numbers and scales of blocks [N, blocks, size]."""
    whole = np.abs(blocks).max(axis=-1) / _MOST
    best = np.zeros(blocks.shape, np.int8)
    scales = np.full(whole.shape, _TINIEST, np.float16)
    least = np.full(whole.shape, np.inf, np.float32)
    for share in _SHARES:
        scale = np.maximum(whole * share, _TINIEST).astype(np.float16)
        wide = scale.astype(np.float32)[..., None]
        numbers = np.clip(np.rint(blocks / wide), _LEAST, _MOST)
        error = np.square(numbers * wide - blocks).sum(axis=-1)
        better = error < least
        least = np.where(better, error, least)
        scales = np.where(better, scale, scales)
        best = np.where(better[..., None], numbers.astype(np.int8), best)
    return best, scales


def pack_int4(numbers: torch.Tensor) -> torch.Tensor:
    """int8 numbers of 4 bits → uint8, two in a byte, the first in the lower half, as ONNX stores int4."""
    flat = numbers.reshape(-1).view(torch.uint8) & 15
    if flat.numel() % 2:
        flat = torch.cat((flat, flat.new_zeros(1)))
    return flat[0::2] | (flat[1::2] << 4)
