"""Whole blocks or short ones: whether the tokens behind a short draft are worth what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from dspark_edge.runtime.scheduling.pricing import Pricing

__all__ = ["WholeBlocks", "forecast_whole_blocks"]

# Short drafts before a whole block is tried again, which costs about a tenth of a token: doubled after each trial that
# does not pay. What a trial wins counts for a quarter of what is known, since trials are few, later blocks for a tenth.
_FIRST_TRIAL, _LONGEST_TRIAL = 8, 64
_TRIAL_GAIN, _WHOLE_BLOCK_GAIN = 0.25, 0.1


class WholeBlocks:
    """Whether the tokens behind a short draft are worth their draft and verification, over recent rounds.

    Args:
        won: tokens a round that they are expected to win, less what plain decoding makes in their time.
    """

    def __init__(self, won: float) -> None:
        self._won = won
        self._wait = _FIRST_TRIAL  # short drafts between two trials of a whole block
        self._passed = 0

    def pay(self) -> bool:
        """Whether the next draft is to be of a whole block: they pay, or it is time to see."""
        return self._won >= 0 or self._passed >= self._wait

    def passed(self) -> None:
        """A short draft was made."""
        self._passed += 1

    def observe(self, won: float) -> None:
        """What a round with a whole block has won."""
        trial, self._passed = self._won < 0, 0
        self._won += (_TRIAL_GAIN if trial else _WHOLE_BLOCK_GAIN) * (won - self._won)
        if trial:
            self._wait = min(2 * self._wait, _LONGEST_TRIAL) if self._won < 0 else _FIRST_TRIAL


def forecast_whole_blocks(conditionals: Sequence[float] | None, pricing: Pricing, block_size: int, short: int) -> float:
    """What a calibration lets expect of a round's tokens behind a short draft, less what they cost: tokens.

    By the mean chances. Rounds in which the confidences tell are worth more: that is seen in a first trial.

    Args:
        conditionals: [γ] mean conditional acceptance by position; None: nothing is known, and nothing is expected.
        pricing: how the engine verifies.
        block_size: γ.
        short: tokens of a short draft; 0: there is none.
    """
    if conditionals is None or not short:
        return 0.0
    prices = [pricing.verify_s((length,), (0,)) for length in range(block_size + 1)]
    chance, tokens, best = prod(conditionals[:short]), 0.0, 0.0
    for conditional, seconds in zip(conditionals[short:], prices[short + 1 :], strict=True):
        chance *= conditional
        tokens += chance
        best = max(best, tokens - (seconds - prices[short]) / prices[0])
    costs = pricing.costs
    return best - (costs.draft_s(1, 0) - costs.draft_s(1, 0, short)) / prices[0]
