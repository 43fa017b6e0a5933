"""What a call costs on this device: the only thing a schedule knows of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

__all__ = ["Costs", "verification_row"]


class Costs(Protocol):
    """Seconds of one call, as measured on this device and interpolated between what was measured.

    `batch` is sequences of a call, `width` tokens of each, `context` tokens that are cached of each.
    """

    def target_s(self, batch: int, width: int, context: int) -> float:
        """One call of the target."""

    def draft_s(self, batch: int, context: int, block: int | None = None) -> float:
        """One call of the drafter: a block for each sequence.

        Args:
            block: tokens of it, where the drafter has blocks of several sizes; None: of the largest.
        """

    def sampler_s(self, batch: int, width: int) -> float:
        """The acceptance of `width` rows of logits a sequence."""


def verification_row(costs: Costs, batch: int, widest: int, context: int) -> list[float]:
    """[widest] seconds of target and acceptance at the widths 1 … widest.

    A round asks for all of them. Costs that know a whole row at once have a method `verification_row`, which is then
    what is asked.
    """
    whole: Callable[[int, int, int], list[float]] | None = getattr(costs, "verification_row", None)
    if whole is not None:
        return whole(batch, widest, context)
    return [costs.target_s(batch, width, context) + costs.sampler_s(batch, width) for width in range(1, widest + 1)]
