"""Weights in blocks of 8 or 4 bits: values → blocks → values.

A row (what one output sums over) is cut into blocks of `block_size` weights. There are two kinds:

- for ONNX Runtime (int8, int4): each block has a float32 scale and a zero point of its own, and a weight is
  (number − zero point) · scale. The rounding is ONNX Runtime's own, called for one matrix at a time, so that weights
  can stream; the layout is that of its operators MatMulNBits and GatherBlockQuantized;
  A matrix that the checkpoint has in such blocks already (`stored_blocks.py`) is not rounded again. Where its blocks
  have offsets that no whole zero point says, the rows get a column for every block, with what is missing: it is
  multiplied with the sum of the block's inputs;
- signed (w4a16): a weight is number · scale, the number in −8 … 7 and the scale a positive float16, as TensorRT wants
  what stands before DequantizeLinear (`signed_rounding.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from dspark_edge.engines.errors import BundleError, CheckpointError, MissingDependencyError
from dspark_edge.engines.manifest import ONNX_RUNTIME_PRECISIONS, QUANTIZED_PRECISIONS, Quantization
from dspark_edge.exporter.signed_rounding import SignedRows, pack_int4, round_signed
from dspark_edge.exporter.stored_blocks import BlockForm, StoredBlocks
from dspark_edge.exporter.weights import RowsSource, Source, WeightSource

__all__ = [
    "BlockFormat",
    "BlockSource",
    "DequantizedSource",
    "LastMatrix",
    "QuantizedRows",
    "WeightFormats",
    "dequantize_rows",
    "keep_blocks",
    "offset_columns",
    "quantize_rows",
    "weight_formats",
]

Part = Literal["blocks", "scales", "zero_points", "numbers"]

_PROJECTION = re.compile(r"(?:.*\.)?(?:qkv_proj|o_proj|gate_up_proj|down_proj|kv_proj)\.weight")
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")

# Rows that are quantised at once: the kernel wants them as columns, and a vocabulary's transpose would be gigabytes.
_PIECE = 4096


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """How weights are stored."""

    bits: Literal[4, 8]
    block_size: int  # weights of a row that share a scale; a power of two, at least 16
    signed: bool = False  # around zero, with float16 scales and no zero points
    kept: bool = False  # whether a checkpoint's own blocks of this size and as many bits are taken as they are

    def keeps(self, form: BlockForm) -> bool:
        """Whether a checkpoint's blocks of this form are taken as they are."""
        return self.kept and (form.bits, form.block_size) == (self.bits, self.block_size)

    def blocks(self, row_size: int) -> int:
        """Blocks of a row; the last may be padded."""
        return -(-row_size // self.block_size)

    def part_shape(self, part: Part, rows: int, row_size: int) -> tuple[int, ...]:
        """Shapes of the arrays of `QuantizedRows`, or `SignedRows`."""
        blocks = self.blocks(row_size)
        if part == "numbers":
            return rows, row_size
        if part == "blocks":
            return rows, blocks, self.block_size * self.bits // 8
        return (rows, blocks) if part == "scales" else (rows, -(-blocks * self.bits // 8))


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """Which parameters of target and drafter are stored in blocks, and how."""

    projections: BlockFormat
    vocabulary: BlockFormat | None  # None: not in blocks

    def of(self, parameter: str) -> BlockFormat | None:
        """The format of a parameter; None where it stays as it is.

        The projections of all layers, those of the drafter's context, and in int8 and int4 embedding and head are in
        blocks. Norms, `fc` (whose inputs reach 2·10⁴), the Markov head and the confidence head are not.
        """
        if _PROJECTION.fullmatch(parameter):
            return self.projections
        return self.vocabulary if parameter in _VOCABULARY else None

    def keeps(self, form: BlockForm) -> bool:
        """Whether a checkpoint's blocks of this form may be taken as they are."""
        return any(layout is not None and layout.keeps(form) for layout in (self.projections, self.vocabulary))


def weight_formats(precision: str, quantization: Quantization | None) -> WeightFormats | None:
    """How a bundle's quantised weights are stored; None where none are.

    Raises:
        BundleError: the precision is one of quantised weights, but nothing says how.
    """
    if precision not in QUANTIZED_PRECISIONS:
        return None
    if quantization is None:
        raise BundleError(
            f"the bundle's weights are {precision}, but its manifest lacks 'quantization'; export it again"
        )
    size = quantization.block_size
    if precision not in ONNX_RUNTIME_PRECISIONS:
        return WeightFormats(BlockFormat(4, size, signed=True), None)
    projections = BlockFormat(4 if precision == "int4" else 8, size, kept=quantization.kept_blocks)
    vocabulary_bits: Literal[4, 8] = 4 if quantization.vocabulary_bits == 4 else 8
    return WeightFormats(projections, dataclasses.replace(projections, bits=vocabulary_bits))


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """A matrix [N, K] in blocks. Numbers of 4 bits lie two in a byte, the first in the lower half.

    With offset columns there are as many more columns as blocks of K, and these are in blocks like the others.
    """

    blocks: npt.NDArray[np.uint8]  # [N, blocks, bytes of a block]
    scales: npt.NDArray[np.float32]  # [N, blocks]
    zero_points: npt.NDArray[np.uint8]  # [N, blocks · bits / 8, rounded up]


def _kernel(bits: int) -> Callable[..., None]:
    """What `onnxruntime.quantization.matmul_nbits_quantizer` calls for a matrix.

    Taken from below that module, which configures Python's root logger when it is imported.
    """
    try:
        from onnxruntime.capi import _pybind_state
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "quantizing weights") from error
    kernel: Callable[..., None] | None = getattr(_pybind_state, f"quantize_matmul_{bits}bits", None)
    if kernel is None:
        raise MissingDependencyError("onnxruntime>=1.23", f"quantizing weights to {bits} bits")
    return kernel


def quantize_rows(rows: npt.NDArray[np.float32], layout: BlockFormat) -> QuantizedRows:
    """Round a matrix [N, K] to blocks: every weight to the nearest of its block's 2^bits values.

    Deterministic, and each row by itself: rows of a quantised matrix are the quantised rows. Needs the matrix, the
    result, and a few thousand rows more.
    """
    count, size = rows.shape
    kernel = _kernel(layout.bits)
    result = QuantizedRows(
        np.zeros(layout.part_shape("blocks", count, size), np.uint8),
        np.zeros(layout.part_shape("scales", count, size), np.float32),
        np.zeros(layout.part_shape("zero_points", count, size), np.uint8),
    )
    padding = layout.blocks(size) * layout.block_size - size
    for begin in range(0, count, _PIECE):
        piece = slice(begin, begin + _PIECE)
        columns = np.ascontiguousarray(np.pad(rows[piece], ((0, 0), (0, padding))).T)
        arrays = (result.blocks[piece], columns, result.scales[piece], result.zero_points[piece])
        kernel(*arrays, layout.block_size, columns.shape[1], size, False)
    return result


def _numbers(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Bytes [N, n] → the numbers in them [N, n · 8 / bits]."""
    if bits == 8:
        return packed
    return np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)


def _packed(numbers: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """The reverse of `_numbers`; a last half byte is 0."""
    if bits == 8:
        return numbers
    pairs = np.pad(numbers, ((0, 0), (0, numbers.shape[1] % 2))).reshape(len(numbers), -1, 2)
    packed: npt.NDArray[np.uint8] = pairs[..., 0] | pairs[..., 1] << 4
    return packed


def keep_blocks(stored: StoredBlocks, layout: BlockFormat, columns: bool) -> QuantizedRows:
    """A matrix [N, K] with the numbers and scales that it is stored with, and zero points for its offsets.

    Args:
        columns: whether the rows get offset columns.
    """
    most = 2**layout.bits - 1
    numbers, scales = stored.numbers.reshape(*stored.scales.shape, -1), stored.scales
    # A block of equal weights may have no scale: all of it is its offset.
    flat = scales == 0
    scales = np.where(flat, stored.offsets / most, scales).astype(np.float32)
    numbers = np.where(flat[..., None], np.uint8(most), numbers)
    offsets = np.where(flat, np.float32(0), stored.offsets)
    exact = np.divide(-offsets, scales, out=np.zeros_like(scales), where=scales != 0)
    zero_points = np.clip(np.rint(exact), 0, most).astype(np.uint8)
    rows = len(scales)
    blocks = _packed(numbers.reshape(rows, -1), layout.bits).reshape(*scales.shape, -1)
    if not columns:
        return QuantizedRows(blocks, scales, _packed(zero_points, layout.bits))
    missing = quantize_rows(offsets + zero_points * scales, layout)
    added = _numbers(missing.zero_points, layout.bits)[:, : missing.scales.shape[1]]
    return QuantizedRows(
        np.concatenate((blocks, missing.blocks), axis=1),
        np.concatenate((scales, missing.scales), axis=1),
        _packed(np.concatenate((zero_points, added), axis=1), layout.bits),
    )


def dequantize_rows(quantized: QuantizedRows, layout: BlockFormat, size: int) -> npt.NDArray[np.float32]:
    """The matrix [N, K = size] that blocks stand for, offset columns included where there are any."""
    values, own = _block_values(quantized, layout), layout.blocks(size) * layout.block_size
    result = np.ascontiguousarray(values[:, :size])
    if values.shape[1] > own:
        columns = values[:, own : own + layout.blocks(size)]
        result += np.repeat(columns, layout.block_size, axis=1)
    return result


def _block_values(quantized: QuantizedRows, layout: BlockFormat) -> npt.NDArray[np.float32]:
    """All blocks' values [N, blocks · block size]."""
    count, blocks = quantized.scales.shape
    result = np.empty((count, blocks * layout.block_size), np.float32)
    for begin in range(0, count, _PIECE):
        piece = slice(begin, begin + _PIECE)
        scales = quantized.scales[piece]
        numbers = _numbers(quantized.blocks[piece].reshape(len(scales), -1), layout.bits)
        zeros = _numbers(quantized.zero_points[piece], layout.bits)[:, :blocks]
        steps = numbers.reshape(len(scales), blocks, -1).astype(np.float32) - zeros[..., None]
        result[piece] = (steps * scales[..., None]).reshape(len(scales), -1)
    return result


def _is_transposed(source: Source) -> bool:
    """Whether a column is an output, as products have it."""
    return isinstance(source, WeightSource) and source.transpose


def _as_rows(source: Source) -> Source:
    """The source of a matrix the way checkpoints have it, a row for every output."""
    if isinstance(source, WeightSource) and source.transpose:
        return dataclasses.replace(source, transpose=False)
    return source


def offset_columns(source: Source, layout: BlockFormat) -> int:
    """Columns that a matrix gets besides its own: as many as a row has blocks, or none."""
    forms = [_kept_form(piece, layout) for piece in _pieces(source)]
    if all(form is None or form.centred for form in forms):
        return 0
    return layout.blocks(_as_rows(source).shape()[1])


def _pieces(source: Source) -> Sequence[WeightSource | RowsSource]:
    """The tensors that a matrix is joined of, if it is read from a checkpoint."""
    return source.pieces() if isinstance(source, WeightSource | RowsSource) else ()


def _kept_form(piece: WeightSource | RowsSource, layout: BlockFormat) -> BlockForm | None:
    """What a tensor's own blocks are, where they are taken as they are."""
    form = piece.block_form()
    return form if form is not None and layout.keeps(form) else None


def _read_finite(source: Source) -> npt.NDArray[np.float32]:
    rows = source.load(torch.float32).numpy()
    _check_finite(source, rows)
    return rows


def _check_finite(source: Source, values: npt.NDArray[np.float32]) -> None:
    # min and max carry NaN and infinity, and need no copy.
    if not (np.isfinite(values.min()) and np.isfinite(values.max())):
        what = " + ".join(source.names) if isinstance(source, WeightSource) else "a matrix"
        where = f"{source.checkpoint.source}: " if isinstance(source, WeightSource) else ""
        raise CheckpointError(f"{where}{what} holds values that are not finite, which cannot be quantized")


def _quantize_piece(piece: WeightSource | RowsSource, layout: BlockFormat, columns: int) -> QuantizedRows:
    """One tensor of a matrix: its own blocks, or its weights rounded, with offset columns of zeros if there are any."""
    if _kept_form(piece, layout) is not None:
        stored = piece.blocks()
        for values in (stored.scales, stored.offsets):
            _check_finite(piece, values)
        return keep_blocks(stored, layout, bool(columns))
    return quantize_rows(np.pad(_read_finite(piece), ((0, 0), (0, columns))), layout)


def _quantize(source: Source, layout: BlockFormat) -> QuantizedRows | SignedRows:
    rows = _as_rows(source)
    pieces = _pieces(rows)
    if all(_kept_form(piece, layout) is None for piece in pieces):
        values = _read_finite(rows)
        return round_signed(values, layout.block_size) if layout.signed else quantize_rows(values, layout)
    columns = offset_columns(source, layout)
    parts = [_quantize_piece(piece, layout, columns) for piece in pieces]
    names = [field.name for field in dataclasses.fields(QuantizedRows)]
    return QuantizedRows(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


@dataclass(slots=True)
class LastMatrix:
    """The parts of the matrix that was quantised last, until each has been taken: one matrix in memory, read once."""

    _key: tuple[Source, BlockFormat] | None = None
    _parts: dict[str, Any] = field(default_factory=dict)

    def take(self, source: Source, layout: BlockFormat, part: Part) -> torch.Tensor:
        """One part of a matrix; it is quantised anew if another was asked for in between, or the part was taken."""
        if self._key != (source, layout) or part not in self._parts:
            self._parts = {}  # let go before the next is read
            quantized = _quantize(source, layout)
            self._key = (source, layout)
            self._parts = {field.name: getattr(quantized, field.name) for field in dataclasses.fields(quantized)}
        return torch.from_numpy(self._parts.pop(part))


@dataclass(frozen=True)
class BlockSource:
    """One part of a quantised matrix, a parameter of a quantised graph."""

    source: Source  # of the matrix
    layout: BlockFormat
    part: Part
    last: LastMatrix = field(compare=False, repr=False)

    def load(self, dtype: torch.dtype) -> torch.Tensor:
        """The part in its own type; signed numbers of 4 bits lie two in a byte, the first in the lower half.

        Raises:
            CheckpointError: the matrix cannot be read, or holds what is not finite.
        """
        part = self.last.take(self.source, self.layout, self.part)
        if self.layout.signed:
            part = part.t().contiguous() if _is_transposed(self.source) else part
            part = pack_int4(part) if self.part == "numbers" else part
        if part.dtype != dtype:
            raise RuntimeError(f"the {self.part} of a quantised matrix are {part.dtype}, not {dtype}")
        return part

    def shape(self) -> tuple[int, ...]:
        """The part's shape in the graph; signed blocks lie as the float matrix does."""
        rows, size = _as_rows(self.source).shape()
        size += offset_columns(self.source, self.layout)
        shape = self.layout.part_shape(self.part, rows, size)
        return shape[::-1] if self.layout.signed and _is_transposed(self.source) else shape


@dataclass(frozen=True)
class DequantizedSource:
    """A matrix with the values that its blocks stand for: what a quantised graph multiplies with."""

    source: Source
    layout: BlockFormat

    def load(self, dtype: torch.dtype) -> torch.Tensor:
        quantized, size = _quantize(self.source, self.layout), _as_rows(self.source).shape()[1]
        if isinstance(quantized, SignedRows):
            values = quantized.values()
        else:
            values = dequantize_rows(quantized, self.layout, size)
        rows = torch.from_numpy(values).to(dtype)
        return rows.t().contiguous() if _is_transposed(self.source) else rows

    def shape(self) -> tuple[int, ...]:
        return self.source.shape()
