"""How a bundle is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.exporter.configuration import DecoderConfig, DrafterConfig
from dspark_edge.exporter.lowerings import get_lowering

__all__ = ["PRECISIONS", "ExportOptions"]

PRECISIONS: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precision → type of weights, activations and caches."""


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

    def __post_init__(self) -> None:
        lowering = get_lowering(self.lowering)
        if self.precision not in PRECISIONS:
            raise InvalidInputError(f"unknown precision {self.precision!r}; choose one of: {', '.join(PRECISIONS)}")
        for name in ("capacity", "max_batch", "candidates", "candidate_pool", "ngram_block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"{name} is {value}, expected at least 1")
        if self.candidate_pool is not None and self.candidate_pool < self.candidates:
            raise InvalidInputError(
                f"candidate_pool is {self.candidate_pool}, expected at least the {self.candidates} candidates"
            )
        if self.max_batch > 1 and not lowering.batched:
            raise InvalidInputError(
                f"the {self.lowering!r} lowering runs one sequence at a time; "
                f"for a max_batch of {self.max_batch} choose the lowering 'onnx' or 'decomposed'"
            )

    @property
    def dtype(self) -> str:
        return PRECISIONS[self.precision]

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
