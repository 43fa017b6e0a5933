"""How a bundle is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.manifest import (
    ACCURACY_LEVELS,
    ONNX_RUNTIME_PRECISIONS,
    QUANTIZED_PRECISIONS,
    WEIGHT_BLOCK_SIZES,
    Quantization,
)
from dspark_edge.exporter.configuration import DecoderConfig, DrafterConfig
from dspark_edge.exporter.lowerings import LOWERINGS, get_lowering

__all__ = ["PRECISIONS", "ExportOptions"]

PRECISIONS: Mapping[str, str] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
    "int8": "float32",
    "int4": "float32",
    "w4a16": "float16",
}
"""Precision → type of activations and caches, and of all weights that are not quantised."""

# Weights of a block, the first that fits: larger ones are faster, and cost 8 bits next to nothing.
_BLOCK_SIZES: Mapping[str, tuple[int, ...]] = {"int8": (64, 32), "int4": (32,)}
_SIGNED_BLOCK_SIZE = 64  # the same of w4a16
_VOCABULARY_BITS = (4, 8)  # of int4; rounding embedding and head to 4 costs more than it saves
_PACKED_SEQUENCES = 4  # where reading weights leaves a processor time for them
_LEAST_SHORTENED = 6  # tokens of a block that is worth a short one of half as many
_ACCURACY_LEVEL = 4  # the kernels that a CPU is fast with


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a bundle is made.

    Raises:
        InvalidInputError: an option is unknown or out of range.
    """

    lowering: str = "ort"
    precision: str = "fp32"
    capacity: int | None = None  # cache slots, tokens; None: 4096 (ort) or 2048, at most what the target was made for
    max_batch: int = 1
    candidates: int = 64  # K, the tokens of a step that drafting samples from
    candidate_pool: int | None = None  # tokens of a position that the Markov bias may lift; None: all
    ngram_block_size: int = 7
    weight_block_size: int | None = None  # weights that share a scale; None: 32 in int4, else 64, or what fits
    accuracy_level: int | None = None  # int8 and int4: 4 rounds activations to int8, 1 keeps them; None: 4
    vocabulary_bits: int | None = None  # int4: bits of embedding and head, 4 or 8; None: 8
    keep_blocks: bool = True  # int8, int4: take a GGUF file's own blocks as they are, where they fit
    # ort: sequences that packed graphs verify in one call, 0 for no such graphs; None: 4 in fp32, 0 elsewhere
    packed_sequences: int | None = None
    short_block: int | None = None  # ort: tokens of a short draft, 0 for no such graph; None: half of a block, of 6 up

    def __post_init__(self) -> None:
        lowering = get_lowering(self.lowering)
        if self.precision not in PRECISIONS:
            raise InvalidInputError(f"unknown precision {self.precision!r}; choose one of: {', '.join(PRECISIONS)}")
        self._check_quantization()
        for name in ("capacity", "max_batch", "candidates", "candidate_pool", "ngram_block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"{name} is {value}, expected at least 1")
        if self.candidate_pool is not None and self.candidate_pool < self.candidates:
            raise InvalidInputError(
                f"candidate_pool is {self.candidate_pool}, expected at least the {self.candidates} candidates"
            )
        if self.packed_sequences and not lowering.packs:
            raise InvalidInputError(
                f"packed_sequences is given, but the {self.lowering!r} lowering verifies batches as it is; "
                "choose a max_batch, or the lowering 'ort'"
            )
        if self.packed_sequences is not None and (self.packed_sequences < 0 or self.packed_sequences == 1):
            raise InvalidInputError(f"packed_sequences is {self.packed_sequences}, expected 0 or at least 2")
        if self.short_block and not lowering.packs:
            raise InvalidInputError(
                f"short_block is given, but the {self.lowering!r} lowering has no short drafts; choose 'ort'"
            )
        if self.short_block is not None and self.short_block < 0:
            raise InvalidInputError(f"short_block is {self.short_block}, expected 0 or more")
        if self.max_batch > 1 and not lowering.batched:
            raise InvalidInputError(
                f"the {self.lowering!r} lowering runs one sequence at a time; "
                f"for a max_batch of {self.max_batch} choose the lowering 'onnx' or 'decomposed'"
            )

    def _check_quantization(self) -> None:
        chosen = {
            "weight_block_size": (self.weight_block_size, WEIGHT_BLOCK_SIZES, QUANTIZED_PRECISIONS),
            "accuracy_level": (self.accuracy_level, ACCURACY_LEVELS, ONNX_RUNTIME_PRECISIONS),
            "vocabulary_bits": (self.vocabulary_bits, _VOCABULARY_BITS, ONNX_RUNTIME_PRECISIONS),
        }
        for name, (value, allowed, precisions) in chosen.items():
            if value is None:
                continue
            if self.precision not in precisions:
                raise InvalidInputError(
                    f"{name} is given, but {self.precision} weights have none; "
                    f"choose the precision {' or '.join(precisions)}, or leave it out"
                )
            if value not in allowed:
                raise InvalidInputError(f"{name} is {value}, expected one of: {', '.join(map(str, allowed))}")
        if self.precision == "int8" and self.vocabulary_bits == 4:
            raise InvalidInputError("vocabulary_bits is 4, but the other weights are int8; choose the precision int4")
        if self.precision in QUANTIZED_PRECISIONS and self.precision not in get_lowering(self.lowering).low_bit:
            able = " or ".join(repr(name) for name in LOWERINGS if self.precision in get_lowering(name).low_bit)
            raise InvalidInputError(
                f"the {self.lowering!r} lowering has no operators for {self.precision} weights; "
                f"choose the lowering {able}, or the precision fp32 or fp16"
            )

    def resolve_quantization(self, target: DecoderConfig, drafter: DrafterConfig | None = None) -> Quantization | None:
        """How the weights are quantised, as the manifest says it; None for float ones.

        Raises:
            InvalidInputError: rows (int8, int4: of the embedding; w4a16: of any projection) are not whole blocks of
                that size.
        """
        if self.precision not in QUANTIZED_PRECISIONS:
            return None
        if self.precision not in ONNX_RUNTIME_PRECISIONS:
            return Quantization(self._signed_block_size(target, drafter), 16)
        # Embedding and head share their bytes only where a row is whole blocks. And of 4-bit blocks there must be an
        # even number: older releases of ONNX Runtime (1.23) look for a row's zero points in the middle of a byte.
        bits = self.vocabulary_bits or max(_VOCABULARY_BITS)
        unit = 2 if bits == 4 else 1
        fitting = [size for size in WEIGHT_BLOCK_SIZES if target.hidden_size % (unit * size) == 0]
        blocks = "an even number of whole blocks" if unit == 2 else "whole blocks"
        demand = f"rows of {target.hidden_size}, the hidden size, have to be {blocks} of {bits} bits"
        chosen = self._block_size(fitting, [*_BLOCK_SIZES[self.precision], *WEIGHT_BLOCK_SIZES], demand, "fp32")
        return Quantization(chosen, bits, self.accuracy_level or _ACCURACY_LEVEL)

    def _signed_block_size(self, target: DecoderConfig, drafter: DrafterConfig | None) -> int:
        """Weights of a block where DequantizeLinear wants whole ones."""
        stacks = [target, *([drafter.backbone] if drafter else [])]
        sizes = {size for one in stacks for size in (one.hidden_size, one.query_size, one.intermediate_size)}
        fitting = [block for block in WEIGHT_BLOCK_SIZES if not any(size % block for size in sizes)]
        rows = ", ".join(map(str, sorted(sizes)))
        demand = f"rows of {rows} weights, those of the layers' projections, have to be whole blocks"
        return self._block_size(fitting, [_SIGNED_BLOCK_SIZE, *WEIGHT_BLOCK_SIZES[::-1]], demand, "fp16")

    def _block_size(self, fitting: Sequence[int], preferred: Sequence[int], demand: str, instead: str) -> int:
        """The size that is asked for, or the first of the preferred ones that fits.

        Args:
            fitting: sizes that the model's rows allow.
            demand: what they have to be, for the message.
            instead: a precision for models that nothing fits.
        """
        wanted = preferred if self.weight_block_size is None else [self.weight_block_size]
        chosen = next((size for size in wanted if size in fitting), None)
        if chosen is None:
            advice = f"choose one of: {', '.join(map(str, fitting))}" if fitting else f"choose the precision {instead}"
            raise InvalidInputError(f"weight_block_size is {wanted[0]}, but {demand}; {advice}")
        return chosen

    @property
    def dtype(self) -> str:
        return PRECISIONS[self.precision]

    def resolve_packed(self) -> int:
        """Sequences of the packed graphs to export; 0 for none.

        Verifying more tokens pays where weights are dear to read, and few sequences leave the most to gain.
        """
        if self.packed_sequences is not None:
            return self.packed_sequences
        return _PACKED_SEQUENCES if get_lowering(self.lowering).packs and self.precision == "fp32" else 0

    def resolve_short_block(self, drafter: DrafterConfig | None) -> int:
        """Tokens of a short draft; 0 for no such graph, as where the drafter has none at all.

        Raises:
            InvalidInputError: it is no shorter than a block.
        """
        if drafter is None:
            return 0
        if self.short_block is not None:
            if self.short_block >= drafter.block_size:
                raise InvalidInputError(
                    f"short_block is {self.short_block}, expected fewer than a block's {drafter.block_size}"
                )
            return self.short_block
        short = get_lowering(self.lowering).packs and drafter.block_size >= _LEAST_SHORTENED
        return drafter.block_size // 2 if short else 0

    def resolve_capacity(self, target: DecoderConfig, block_size: int) -> int:
        """The capacity to export with.

        Raises:
            InvalidInputError: it passes the target's context, or holds no block.
        """
        if self.capacity is None:
            default = 4096 if get_lowering(self.lowering).dynamic_capacity else 2048
            return min(default, target.max_position_embeddings)
        if self.capacity > target.max_position_embeddings:
            raise InvalidInputError(
                f"capacity is {self.capacity}, but the target was made for {target.max_position_embeddings} positions"
            )
        if self.capacity <= block_size + 1:
            raise InvalidInputError(f"capacity is {self.capacity}, expected more than a block of {block_size} tokens")
        return self.capacity

    def resolve_candidates(self, drafter: DrafterConfig) -> int:
        """K: never more than there are tokens that can be drafted."""
        return min(self.candidates, drafter.head_size)

    def resolve_pool(self, drafter: DrafterConfig) -> int | None:
        """The pool to export with; None where it would bound nothing."""
        pool = self.candidate_pool
        return None if pool is None or pool >= drafter.head_size or not drafter.markov_rank else pool
