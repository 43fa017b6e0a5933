"""For which shapes engines are built: optimisation profiles, as numbers.

A graph runs in a few ways that differ in shape, and each gets a profile of its own, so that kernels are chosen for it:

| graph | profile | batch | width | rows with logits |
| --- | --- | --- | --- | --- |
| target | `prefill` | 1 (`tensorrt-rtx`: 2) | 1 … chunk, chosen for the chunk | 1 |
| target | `decode` | 1 … most | 1 | 1 |
| target | `verify` | 1 … most | 2 … widest, chosen for the widest | as the width |
| drafter | `draft` | 1 … most | | |
| samplers | `accept` | 1 … most | | 1 … widest |

Kernels of `decode` and `verify` are chosen for one sequence, which is what devices at the edge decode. Where kernels
are compiled for the shapes that come (TensorRT for RTX), there is no `decode`, and `verify` begins at width 1: one for
itself would only put the target's weights into the engine a second time, in the order that its kernels like.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dspark_edge.engines.engine import sized
from dspark_edge.engines.errors import CapacityError, InvalidInputError
from dspark_edge.engines.manifest import Manifest, TensorSpec
from dspark_edge.engines.records import Positive, Record

__all__ = ["BuildSizes", "ShapeProfile", "profiles_of", "resolve_sizes", "top_k_values"]

_PREFILL_CHUNK = 512
# TensorRT's TopK takes no more (its documentation, "TopK").
_MOST_TOP_K = 3840


@dataclass(frozen=True, slots=True)
class BuildSizes(Record):
    """What a bundle's engines will be able to run."""

    max_batch: Positive
    prefill_chunk: Positive  # tokens of a prompt in a call
    widths: tuple[Positive, ...]  # of target calls besides prefill, rising; 1 is plain decoding

    @property
    def widest(self) -> int:
        return self.widths[-1]


@dataclass(frozen=True, slots=True)
class ShapeProfile(Record):
    """Sizes of a graph's symbolic dimensions."""

    name: str
    least: Mapping[str, Positive]
    common: Mapping[str, Positive]  # what kernels are chosen for
    most: Mapping[str, Positive]

    def shapes(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Least, common and most of an input."""
        return sized(spec, self.least), sized(spec, self.common), sized(spec, self.most)


def resolve_sizes(
    manifest: Manifest, widths: tuple[int, ...] | None, max_batch: int | None, prefill_chunk: int | None
) -> BuildSizes:
    """The sizes to build for; what is None is taken from the bundle.

    Args:
        widths: None or none: 1 … block size + 1.

    Raises:
        InvalidInputError: a size is below 1, or widths lack 1.
        CapacityError: it is more than the bundle was exported for.
    """
    limits, block = manifest.limits, manifest.drafter.block_size
    chosen = tuple(sorted(set(widths))) if widths else tuple(range(1, block + 2))
    if chosen[0] != 1:
        raise InvalidInputError(f"widths are {', '.join(map(str, chosen))}; they must have 1, which is plain decoding")
    batch = limits.max_batch if max_batch is None else max_batch
    chunk = min(_PREFILL_CHUNK, limits.capacity) if prefill_chunk is None else prefill_chunk
    for name, value, most in (
        ("max_batch", batch, limits.max_batch),
        ("prefill_chunk", chunk, limits.capacity),
        ("the widest width", chosen[-1], min(limits.capacity, block + 1)),
    ):
        if value < 1:
            raise InvalidInputError(f"{name} is {value}, expected at least 1")
        if value > most:
            raise CapacityError(
                f"{name} is {value}, but the bundle was exported for {most}; export it again, or lower it"
            )
    return BuildSizes(batch, chunk, chosen)


def profiles_of(
    role: str, manifest: Manifest, sizes: BuildSizes, *, compiles_late: bool = False
) -> tuple[ShapeProfile, ...]:
    """The optimisation profiles of a graph; with one width, a target has no `verify`.

    Args:
        compiles_late: whether kernels are compiled where the engine runs, for the shapes that come.
    """
    batch, widest = sizes.max_batch, sizes.widest
    block, candidates = manifest.drafter.block_size, max(1, manifest.drafter.candidates)
    if role == "target":
        chunk = sizes.prefill_chunk
        # One sequence at a time is read. But TensorRT for RTX packs weights again for a profile of one sequence beside
        # one of several (446 MB instead of 319 of SmolLM2-135M in fp16); what it packs for two serves more.
        together = min(batch, 2) if compiles_late else 1
        prefill = ShapeProfile("prefill", _target(1, 1, 1), _target(1, chunk, 1), _target(together, chunk, 1))
        decode = ShapeProfile("decode", _target(1, 1, 1), _target(1, 1, 1), _target(batch, 1, 1))
        if widest == 1:
            return prefill, decode
        common, most = _target(1, widest, widest), _target(batch, widest, widest)
        if compiles_late:
            return prefill, ShapeProfile("verify", _target(1, 1, 1), common, most)
        return prefill, decode, ShapeProfile("verify", _target(1, 2, 2), common, most)
    if role == "drafter":
        return (ShapeProfile("draft", {"batch": 1}, {"batch": 1}, {"batch": batch}),)
    least = {"batch": 1, "rows": 1, "block": 1, "candidates": 1}
    common = {"batch": 1, "rows": widest, "block": block, "candidates": candidates}
    return (ShapeProfile("accept", least, common, {**common, "batch": batch}),)


def top_k_values(vocab_size: int) -> tuple[int, int, int]:
    """Least, common and most of the samplers' `pool`, whose value is the size of a TopK."""
    most = min(vocab_size, _MOST_TOP_K)
    return 1, min(most, 1024), most


def _target(batch: int, width: int, rows: int) -> dict[str, int]:
    return {"batch": batch, "width": width, "rows": rows}
