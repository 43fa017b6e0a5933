"""Costs that follow the machine: a profile, corrected by the times that rounds really take.

A machine gets hotter or busier, and then everything is slower; or only verifications are, since they compute more for
each byte that they read; or only some sizes of call. So the logarithm of observed over profiled time is modelled as a
sum: the **drift** of the call's class, and a **deviation** of its bucket (kind of call, batch, width, context within a
factor of two), which moves fast while the bucket is new and slowly after that. A bucket that was never observed has
the drift alone.

Target calls have two classes, plain steps (width 1) and verifications. A class that is called has its own drift. One
that is not goes along with the other: what is not seen is taken to have changed as what is seen, fully after eight
calls of the other. Drafter and sampler go along with what the two classes agree on, and have quick deviations of
their own; they do not move the drifts, as they are short and badly timed.

A single outlier (another process, a page fault) moves nothing: a drift follows the median of the last three residuals
of its class, and a deviation takes steps of limited size. A class of a machine that becomes twice as slow is 90 %
followed after about ten calls.

What is not called is not seen. If only verifications become slower, plain steps are taken to be slower, too, and
nothing would ever tell: then plain decoding is the way out, and looks as dear as before. `target_doubt` says how far
the prediction has moved since a bucket was seen; where it is large, one call there is worth its time, and is believed.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from dspark_edge.runtime.scheduling.costs import Costs

__all__ = ["CorrectedCosts"]

_FIRST_DRIFT_GAIN, _DRIFT_GAIN = 0.6, 0.25  # share of the residual taken over: at the first observation, later
_FIRST_GAIN, _GAIN = 0.15, 0.01  # the same of a target bucket's deviation
_LOCAL_FIRST_GAIN, _LOCAL_GAIN = 0.5, 0.1  # of drafter's and sampler's
_DOUBTED_GAIN = 0.8  # of a drift that has been guessed for long
_DOUBT = 0.25  # such a drift has moved by more than this
_LARGEST_STEP = 0.25  # logarithm of the ratio that one observation can argue for, beyond what others argue for
_WIDEST = 3.0  # no ratio beyond e^±3: such a time is no call's
_CALLS_TO_FOLLOW = 8  # of the other class, until a class that is not called has gone along fully

_Bucket = tuple[str, int, int, int]  # kind, batch, width, context as a power of two


@dataclass(slots=True)
class _Drift:
    """Of a class of target calls, as a logarithm of the ratio."""

    value: float = 0.0  # when last observed
    count: int = 0  # observations
    others: int = 0  # observations of the other class since
    other_value: float = 0.0  # the other class's when this one was last observed
    residuals: deque[float] = field(default_factory=lambda: deque(maxlen=3))
    factor: float = 1.0  # e^prediction

    def prediction(self, other: _Drift) -> float:
        """By now, gone along with the other class as far as its own observations are old."""
        share = min(1.0, self.others / _CALLS_TO_FOLLOW) if self.count else 1.0
        return self.value + share * (other.value - self.other_value)


@dataclass(slots=True)
class _Deviation:
    """A bucket's own part of the logarithm of the ratio."""

    value: float = 0.0
    count: int = 0  # observations
    drift: float = 0.0  # predicted for its class when it was last observed
    factor: float = 1.0  # e^value


class CorrectedCosts:
    """Another `Costs` with what was observed since. Not for several threads at once.

    Args:
        base: the profile.
    """

    def __init__(self, base: Costs) -> None:
        self.base = base
        self._plain, self._verifying = _Drift(), _Drift()
        self._shared, self._shared_factor = 0.0, 1.0  # what both classes agree on
        self._deviations: dict[tuple[str, int, int], dict[int, _Deviation]] = {}  # kind, batch, context → width
        self._sampler_rows: dict[tuple[int, int], list[float]] = {}  # by batch and widest, as profiled

    @property
    def drift(self) -> float:
        """How much slower than profiled the machine is on the whole, as a factor."""
        return self._shared_factor

    def target_s(self, batch: int, width: int, context: int) -> float:
        drift = self._plain if width == 1 else self._verifying
        seconds = self.base.target_s(batch, width, context) * drift.factor
        return seconds * self._own_factor(_bucket("target", batch, width, context))

    def draft_s(self, batch: int, context: int, block: int | None = None) -> float:
        seconds = self.base.draft_s(batch, context, block) * self._shared_factor
        return seconds * self._own_factor(_bucket("draft", batch, block or 0, context))

    def sampler_s(self, batch: int, width: int) -> float:
        seconds = self.base.sampler_s(batch, width) * self._shared_factor
        return seconds * self._own_factor(_bucket("sampler", batch, width, 0))

    def verification_row(self, batch: int, widest: int, context: int) -> list[float]:
        """[widest] of target and acceptance at the widths 1 … widest; see `costs.verification_row`."""
        targets, samplers = self._base_rows(batch, widest, context)
        # A packed group asks for dozens of widths in every round, and few of them have been observed.
        for row, key in ((targets, ("target", batch, context.bit_length())), (samplers, ("sampler", batch, 0))):
            for width, found in self._deviations.get(key, {}).items():
                if width <= widest:
                    row[width - 1] *= found.factor
        verifying, shared = self._verifying.factor, self._shared_factor
        seconds = [target * verifying + sampler * shared for target, sampler in zip(targets, samplers, strict=True)]
        seconds[0] = targets[0] * self._plain.factor + samplers[0] * shared
        return seconds

    def observe_target(self, batch: int, width: int, context: int, seconds: float) -> None:
        """A target call took so long."""
        self._observe_target(batch, width, context, seconds, self.base.target_s(batch, width, context))

    def _observe_target(self, batch: int, width: int, context: int, seconds: float, profiled: float) -> None:
        logarithm = _log_ratio(seconds, profiled)
        if logarithm is None:
            return
        found = self._deviation(_bucket("target", batch, width, context))
        drift, other = self._classes(width)
        predicted = drift.prediction(other)
        residual = logarithm - found.value
        self._move_drift(drift, other, residual)
        moved = abs(predicted - found.drift) if found.count else 0.0
        self._move(found, residual - drift.value, max(_GAIN, _FIRST_GAIN / (1 + found.count)), _LARGEST_STEP + moved)
        found.drift = drift.value

    def observe_draft(self, batch: int, context: int, seconds: float, block: int | None = None) -> None:
        """A drafter call took so long."""
        profiled = self.base.draft_s(batch, context, block)
        self._observe_local(_bucket("draft", batch, block or 0, context), seconds, profiled)

    def observe_sampler(self, batch: int, width: int, seconds: float) -> None:
        """An acceptance took so long."""
        self._observe_local(_bucket("sampler", batch, width, 0), seconds, self.base.sampler_s(batch, width))

    def observe_verification(self, batch: int, width: int, context: int, seconds: float) -> None:
        """Target and acceptance together took so long: the acceptance as long as predicted, the target the rest."""
        profiled = self.base.target_s(batch, width, context)
        drift = self._plain if width == 1 else self._verifying
        target = profiled * drift.factor * self._own_factor(_bucket("target", batch, width, context))
        sampler = self.sampler_s(batch, width)
        share = target / (target + sampler) if target + sampler > 0 else 1.0
        # Where the acceptance is most of it, the rest would be noise, or negative: both by their shares then.
        self._observe_target(batch, width, context, max(seconds - sampler, seconds * share / 2), profiled)

    def target_doubt(self, batch: int, width: int, context: int) -> float:
        """How far the drift has been guessed since such a target call was observed: |logarithm| of a ratio."""
        drift, other = self._classes(width)
        found = self._known(_bucket("target", batch, width, context))
        return abs(drift.prediction(other) - (found.drift if found is not None else 0.0))

    def _base_rows(self, batch: int, widest: int, context: int) -> tuple[list[float], list[float]]:
        """As profiled: of the target, and of the acceptance, which does not depend on the context; to be written to."""
        samplers = self._sampler_rows.get((batch, widest))
        if samplers is None:
            samplers = [self.base.sampler_s(batch, width) for width in range(1, widest + 1)]
            self._sampler_rows[batch, widest] = samplers
        whole = getattr(self.base, "target_row", None)
        if whole is not None:
            return [*whole(batch, widest, context)], [*samplers]
        return [self.base.target_s(batch, width, context) for width in range(1, widest + 1)], [*samplers]

    def _classes(self, width: int) -> tuple[_Drift, _Drift]:
        """The drift of calls of this width, and the other one."""
        return (self._plain, self._verifying) if width == 1 else (self._verifying, self._plain)

    def _deviation(self, bucket: _Bucket) -> _Deviation:
        """A bucket's, which is about to be observed."""
        kind, batch, width, context = bucket
        return self._deviations.setdefault((kind, batch, context), {}).setdefault(width, _Deviation())

    def _own_factor(self, bucket: _Bucket) -> float:
        found = self._known(bucket)
        return 1.0 if found is None else found.factor

    def _known(self, bucket: _Bucket) -> _Deviation | None:
        kind, batch, width, context = bucket
        return self._deviations.get((kind, batch, context), {}).get(width)

    def _move_drift(self, drift: _Drift, other: _Drift, residual: float) -> None:
        """Take an observation of a class into its drift."""
        predicted = drift.prediction(other)
        guessed = abs(predicted - drift.value)
        gain = max(_DRIFT_GAIN, _FIRST_DRIFT_GAIN / (1 + drift.count))
        if drift.count and guessed > _DOUBT:
            drift.residuals.clear()  # of another time
            gain = _DOUBTED_GAIN
            residual = min(max(residual, predicted - guessed - _LARGEST_STEP), predicted + guessed + _LARGEST_STEP)
        drift.residuals.append(residual)
        drift.value = predicted + gain * (median(drift.residuals) - predicted)
        drift.count += 1
        drift.others = 0
        drift.other_value = other.value if other.count else other.prediction(drift)
        other.others += 1
        predictions = drift.prediction(other), other.prediction(drift)
        drift.factor, other.factor = (math.exp(value) for value in predictions)
        low, high = min(predictions), max(predictions)
        self._shared = max(low, 0.0) if high > 0 else high
        self._shared_factor = math.exp(self._shared)

    def _observe_local(self, bucket: _Bucket, seconds: float, profiled: float) -> None:
        logarithm = _log_ratio(seconds, profiled)
        if logarithm is None:
            return
        found = self._deviation(bucket)
        gain = max(_LOCAL_GAIN, _LOCAL_FIRST_GAIN / (1 + found.count))
        # The first is taken at its word: how far a short call is off is unknown, and nothing else tells.
        step = _LARGEST_STEP if found.count else _WIDEST
        self._move(found, logarithm - found.value - self._shared, gain, step)

    def _move(self, found: _Deviation, residual: float, gain: float, step: float) -> None:
        found.value += gain * min(max(residual, -step), step)
        found.factor = math.exp(found.value)
        found.count += 1


def _bucket(kind: str, batch: int, width: int, context: int) -> _Bucket:
    return kind, batch, width, context.bit_length()


def _log_ratio(seconds: float, profiled: float) -> float | None:
    """None where there is nothing to compare."""
    if not (seconds > 0 and profiled > 0):
        return None
    return min(max(math.log(seconds / profiled), -_WIDEST), _WIDEST)
