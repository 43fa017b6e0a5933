"""Bit-exact mode: what it fixes, and whether a backend lets it.

Kernels are chosen by shape, and other kernels sum in another order: logits of a call of 1 token and of one of 8 differ
in their last bits. In this mode every call that decodes has one shape, 1 x W with W = γ + 1, whether it verifies a
whole block, a part of it or nothing, and whoever else is being answered; and a prompt is cut into chunks by its length
alone. What is left is that a kernel must give a token the same bits in whichever row of the call it stands:
`check_rows` finds out. See docs/bit-exact.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dspark_edge.engines.engine import Buffer, Engine, HostArray
from dspark_edge.engines.errors import EngineError, InvalidInputError
from dspark_edge.engines.manifest import Manifest

__all__ = ["EXACT_PREFILL_CHUNK", "check_rows", "chunk_of", "exact_width", "reserved_slots", "whole_chunks"]

EXACT_PREFILL_CHUNK = 64
"""Prompt tokens a call, in single streams as in batches: it is part of what the bits depend on."""


def exact_width(manifest: Manifest) -> int:
    """W = γ + 1, tokens of every call that decodes.

    Raises:
        InvalidInputError: a sequence's cache has no room for such a call behind a token.
    """
    width, capacity = manifest.drafter.block_size + 1, manifest.limits.capacity
    if capacity < width:
        raise InvalidInputError(
            f"bit_exact runs {width} tokens a call, the bundle's capacity is {capacity}; "
            "export with a larger --capacity"
        )
    return width


def reserved_slots(width: int | None) -> int:
    """Cache slots at a sequence's end that are kept free, so that a call of `width` (None: any) always has room."""
    return 0 if width is None else width - 1


def chunk_of(given: int | None, default: int, bit_exact: bool) -> int:
    """Most prompt tokens a call.

    Args:
        given: as an option; None: not given.
        default: outside of the mode.
        bit_exact: whether the mode is on.

    Raises:
        InvalidInputError: it is below 1, or another one than the mode's.
    """
    if given is not None and given < 1:
        raise InvalidInputError(f"prefill_chunk is {given}, expected at least 1")
    if not bit_exact:
        return default if given is None else given
    if given not in (None, EXACT_PREFILL_CHUNK):
        raise InvalidInputError(
            f"prefill_chunk is {given}, but bit_exact fixes it at {EXACT_PREFILL_CHUNK}, so that a prompt's cache is "
            "the same everywhere; give one of the two"
        )
    return EXACT_PREFILL_CHUNK


def whole_chunks(length: int) -> int:
    """The part of `length` tokens that is prefilled in whole chunks, by the same calls in every longer prompt."""
    return length - length % EXACT_PREFILL_CHUNK


def check_rows(engine: Engine, width: int, caches: Mapping[str, Buffer]) -> None:
    """Whether a token's logits have the same bits in each row of a call: three calls, and a comparison.

    Two calls run the same text, the second one from one token later: its row r − 1 is the first one's row r. Equal
    bits in all of them make all rows alike, on this text: an experiment, no proof.

    Args:
        engine: executes the target.
        width: W, tokens of a call.
        caches: [1, heads, capacity, head size] that the target takes; slots from 0 on are overwritten.

    Raises:
        EngineError: they differ, or the backend failed.
    """
    room = next(iter(caches.values())).shape[2] - width - 1  # in front of the first call
    start = min(width, room)
    if start < 1:  # next to nothing can be decoded in such caches
        return
    call = _Call(engine, width, caches)
    token_ids = [(37 * index + 11) % call.vocabulary for index in range(start + width + 1)]
    call.run(token_ids[:width], 0)
    first = call.run(token_ids[start : start + width], start)
    second = call.run(token_ids[start + 1 :], start + 1)
    differing = [row for row in range(1, width) if first[row].tobytes() != second[row - 1].tobytes()]
    if differing:
        rows = ", ".join(map(str, differing))
        raise EngineError(
            f"bit_exact cannot be kept here: in calls of {width} tokens this backend gives a token other bits in row "
            f"{rows} than in the row before; decode without bit_exact, or choose another precision or --provider"
        )


class _Call:
    """The target at one width, with all logits."""

    def __init__(self, engine: Engine, width: int, caches: Mapping[str, Buffer]) -> None:
        self.vocabulary = engine.bundle.manifest.target.vocab_size
        self._token_ids, rows = engine.allocate("int64", (1, width)), engine.allocate("int64", (1, width))
        rows.write(np.arange(width))
        self._start = engine.allocate("int64", (1,))
        self._logits = engine.allocate("float32", (1, width, self.vocabulary))
        inputs = {"input_ids": self._token_ids, "cache_lengths": self._start, "logit_rows": rows}
        self._call = engine.bind("target", {**inputs, "logits": self._logits, **caches})

    def run(self, token_ids: Sequence[int], start: int) -> HostArray:
        """[W, V] logits of tokens at positions start …; a copy."""
        self._token_ids.write(token_ids)
        self._start.write(start)
        self._call.run()
        logits: HostArray = self._logits.read()[0].copy()
        return logits
