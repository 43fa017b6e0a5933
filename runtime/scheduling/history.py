"""What earlier rounds say of acceptance: the forecasts of a sequence and of the engine.

Two things are learned of every drafted round, whatever was verified of it:

- **Conditional acceptance by position**: the chance that d_k is accepted given that those before it were. A round
  tells of position k as far as its first k − 1 drafts were accepted. That is known where they were verified; behind
  that it has a probability, the product of the confidences, which is the round's weight. The value is the calibrated
  confidence (it varies less than a zero or a one), or the outcome where a drafter has no confidences.
- **Trust**: accepted drafts by those that the confidences promised, over verified ones whose predecessors were
  accepted. A calibration is fitted on prompts of another kind than the present one; live confidences are multiplied by
  the trust.

A sequence starts with the engine's means. All of it is of earlier rounds, so it may be used freely at any temperature.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from operator import mul, truediv

__all__ = ["Acceptance", "History", "survivals_of"]

_UNKNOWN = 0.6  # conditional acceptance of a position that nothing is known of: hopeful, or it would never be tried
_UNKNOWN_WEIGHT = 0.5  # rounds that this counts for
_PRIOR_WEIGHT = 2.0  # rounds that the engine's means count for in a new sequence
_PROMISED = 6.0  # promised drafts that the starting trust counts for
_LEAST, _MOST = 0.01, 0.999  # of forecasts and trusted confidences: nothing is impossible, or certain
_LEAST_TRUST, _MOST_TRUST = 0.2, 1.25


def survivals_of(conditionals: Sequence[float]) -> tuple[float, ...]:
    """Running products."""
    return tuple(accumulate(conditionals, mul))


class Acceptance:
    """Running means of conditional acceptance by position, and of the trust in confidences.

    Args:
        conditionals: [γ] means to start from; None: nothing is known.
        trust: to start from.
        weight: rounds that `conditionals` count for.
        memory: what is left of a round's weight after the next.
    """

    def __init__(
        self, block_size: int, conditionals: Sequence[float] | None, trust: float, weight: float, memory: float
    ) -> None:
        means = [_UNKNOWN] * block_size if conditionals is None else list(conditionals)
        self._weights = [weight] * block_size
        self._sums = [mean * weight for mean in means]
        self._memory = memory
        self._trust_memory = 1 - (1 - memory) / 10  # trust is a slow matter: it takes many outcomes to tell
        self._promised, self._accepted = _PROMISED, _PROMISED * trust
        self.trust = self._ratio()  # accepted drafts by promised ones

    @property
    def conditionals(self) -> list[float]:
        """[γ] means, each within (0, 1)."""
        means = map(truediv, self._sums, self._weights)
        return [_LEAST if mean < _LEAST else mean if mean < _MOST else _MOST for mean in means]

    def observe(self, confidences: Sequence[float] | None, verify_length: int, accepted: int) -> None:
        """Learn from a drafted round.

        Args:
            confidences: of its drafts, calibrated and not yet multiplied by the trust; None: the drafter has none.
            verify_length: drafts that were verified.
            accepted: drafts that were accepted, at most `verify_length`.
        """
        judged = min(accepted + 1, verify_length)  # verified, with all predecessors accepted
        # A round learns this of every request, twice: no calls in the loops.
        weights, sums, memory = self._weights, self._sums, self._memory
        if confidences is None:
            for position in range(judged):
                weights[position] = weights[position] * memory + 1
                sums[position] = sums[position] * memory + (position < accepted)
            return
        trust = self.trust
        weight = 1.0
        for position, confidence in enumerate(confidences):
            value = confidence * trust
            if value > _MOST:
                value = _MOST
            left = 1 - (1 - memory) * weight
            weights[position] = weights[position] * left + weight
            sums[position] = sums[position] * left + weight * value
            if position >= verify_length:
                weight *= value  # not verified: accepted with this chance
            elif position >= accepted:
                break  # rejected: what is behind it continues another text
        for position in range(judged):
            self._promised = self._promised * self._trust_memory + confidences[position]
            self._accepted = self._accepted * self._trust_memory + (position < accepted)
        self.trust = self._ratio()

    def _ratio(self) -> float:
        return min(max(self._accepted / self._promised, _LEAST_TRUST), _MOST_TRUST)


class History:
    """Of one sequence.

    Args:
        block_size: γ.
        engine: of the engine's recent rounds; what a sequence starts from.
    """

    def __init__(self, block_size: int, engine: Acceptance) -> None:
        self._acceptance = Acceptance(block_size, engine.conditionals, engine.trust, _PRIOR_WEIGHT, memory=0.9)
        self._expected = survivals_of(self._acceptance.conditionals)
        self._recent: deque[tuple[float, ...]] = deque(maxlen=2)

    @property
    def expected(self) -> tuple[float, ...]:
        """[γ] survivals as forecast."""
        return self._expected

    @property
    def trust(self) -> float:
        return self._acceptance.trust

    def live(self, confidences: Sequence[float] | None, drafted: int) -> tuple[float, ...]:
        """[drafted] survivals of a draft: by its confidences, or by the forecast where it has none."""
        if confidences is None:
            return self._expected[:drafted]
        trust = self._acceptance.trust
        return survivals_of(  # min() would take longer than all the rest of a round's decisions
            [value if (value := confidence * trust) < _MOST else _MOST for confidence in confidences[:drafted]]
        )

    def lagged(self, drafted: int) -> tuple[float, ...]:
        """[drafted] survivals of two drafted rounds ago, with forecasts behind where it had fewer."""
        if len(self._recent) < 2:
            return self._expected[:drafted]
        old = self._recent[0][:drafted]
        last = old[-1] if old else 1.0
        return old + tuple(min(value, last) for value in self._expected[len(old) : drafted])

    def observe(
        self, survivals: tuple[float, ...], confidences: Sequence[float] | None, verify_length: int, accepted: int
    ) -> None:
        """Learn from a drafted round; see `Acceptance.observe`.

        Args:
            survivals: what `live` gave for it.
        """
        self._acceptance.observe(confidences, verify_length, accepted)
        self._expected = survivals_of(self._acceptance.conditionals)
        self._recent.append(survivals)


def unknown_acceptance(block_size: int, conditionals: Sequence[float] | None = None) -> Acceptance:
    """What an engine starts from: a calibration's mean conditional acceptances, or nothing."""
    weight = _UNKNOWN_WEIGHT if conditionals is None else 4 * _PRIOR_WEIGHT
    return Acceptance(block_size, conditionals, 1.0, weight, memory=0.98)
