"""What a call costs on this device: the only thing a schedule knows of it."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Costs"]


class Costs(Protocol):
    """Seconds of one call, as measured on this device and interpolated between what was measured.

    `batch` is sequences of a call, `width` tokens of each, `context` tokens that are cached of each.
    """

    def target_s(self, batch: int, width: int, context: int) -> float:
        """One call of the target."""

    def draft_s(self, batch: int, context: int) -> float:
        """One call of the drafter: a block for each sequence."""

    def sampler_s(self, batch: int, width: int) -> float:
        """The acceptance of `width` rows of logits a sequence."""
