"""Calibrated confidences: what a drafter's confidence logits are worth, as measured on prompts of its target.

A confidence head is trained towards the chance of acceptance at temperature 1, position by position; what it says of
a real round is too sure or not sure enough. Sequential Temperature Scaling (DSpark) divides each position's logit by
a temperature, fitted left to right so that the running product of the confidences, the survival, is right. Where no
single temperature can be right, a bias is added, and logits below zero get a temperature of their own (beta
calibration: Kull, Silva Filho and Flach 2017). All of it keeps the order of a position's confidences.

`dspark-edge calibrate` fits and writes `calibration.json` beside a bundle's manifest; the runtime only applies it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import BundleError

__all__ = ["CALIBRATION_NAME", "METHOD", "SCHEMA_VERSION", "Calibration", "CalibrationData", "Fit", "Scaling"]

CALIBRATION_NAME = "calibration.json"
SCHEMA_VERSION = 1
METHOD = "sequential_temperature_scaling"


@dataclass(frozen=True, slots=True)
class Scaling:
    """What is done to the confidence logits of a block, position by position.

    A logit z becomes softplus(z) / temperature - softplus(-z) / temperature_below + bias: z / temperature + bias where
    the two temperatures are equal, and otherwise a smooth passage from one slope to the other around zero. Rises with
    z always.
    """

    temperatures: tuple[float, ...]  # [γ], above 0
    temperatures_below: tuple[float, ...]  # [γ], above 0: of logits below 0
    biases: tuple[float, ...]  # [γ]

    @classmethod
    def identity(cls, block_size: int) -> Scaling:
        """Leaves the logits as they are."""
        return cls((1.0,) * block_size, (1.0,) * block_size, (0.0,) * block_size)

    def confidences(self, logits: Sequence[float]) -> tuple[float, ...]:
        """The chance that each draft token is accepted, given that those before it were.

        Args:
            logits: of the first positions of a block, at most γ.
        """
        parts = zip(logits, self.temperatures, self.temperatures_below, self.biases, strict=False)
        return tuple(_sigmoid(_scaled(logit, above, below) + bias) for logit, above, below, bias in parts)

    def survival(self, logits: Sequence[float]) -> tuple[float, ...]:
        """The chance that each draft token and all before it are accepted: the running product of `confidences`."""
        survival, product = [], 1.0
        for confidence in self.confidences(logits):
            product *= confidence
            survival.append(product)
        return tuple(survival)


@dataclass(frozen=True, slots=True)
class Fit:
    """The scaling for one temperature of sampling, and how well it does on the prompts it was fitted on."""

    sampling_temperature: float  # 0: greedy
    scaling: Scaling
    samples: tuple[int, ...]  # [γ] drafts judged whose predecessors were all accepted
    ece_before: tuple[float | None, ...]  # [γ] of the conditional confidences; None without samples
    ece_after: tuple[float | None, ...]
    survival_ece_before: tuple[float | None, ...]  # [γ] of the running products
    survival_ece_after: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class CalibrationData:
    """What a calibration was fitted on."""

    sha256: str  # of the prompts, see `prompts.hash_prompts`
    prompts: int
    prompt_digests: tuple[str, ...]  # `PromptRecord.digest` of each: finds prompts that an evaluation repeats
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """A bundle's calibration: how to scale its drafter's confidence logits.

    Acceptance depends on how the target is sampled (greedy decoding accepts what is likeliest, sampling what is
    drawn), so there may be a fit for each of several temperatures.
    """

    fits: tuple[Fit, ...]  # at least one, by rising temperature of sampling
    data: CalibrationData
    method: str = METHOD

    @classmethod
    def identity(cls, block_size: int) -> Calibration:
        """Takes confidence logits at their word; made of no data."""
        nothing: tuple[None, ...] = (None,) * block_size
        fit = Fit(0.0, Scaling.identity(block_size), (0,) * block_size, nothing, nothing, nothing, nothing)
        return cls((fit,), CalibrationData("", 0, (), 0, 0))

    @classmethod
    def load(cls, bundle: Bundle) -> Calibration | None:
        """A bundle's calibration; None where it has none.

        Raises:
            BundleError: `calibration.json` is damaged, of a newer version, or does not fit the drafter's block.
        """
        if not bundle.has(CALIBRATION_NAME):
            return None
        where = f"{bundle.path / CALIBRATION_NAME}"
        data = bundle.read_json(CALIBRATION_NAME, _ADVICE)
        return cls.from_json(data, bundle.manifest.drafter.block_size, where)

    @classmethod
    def from_json(cls, data: Any, block_size: int, where: str = CALIBRATION_NAME) -> Calibration:
        """The calibration in a parsed `calibration.json`.

        Raises:
            BundleError: it is damaged, newer, or for another block size; the message begins with `where`.
        """
        reader = _Reader(where, data)
        version = reader.take("schema_version", _is_count, "a whole number of at least 1")
        if version != SCHEMA_VERSION:
            newer = version > SCHEMA_VERSION
            fix = "upgrade dspark-edge, or calibrate again" if newer else _ADVICE
            raise BundleError(f"{where} has schema version {version}, this version reads {SCHEMA_VERSION}; {fix}")
        method = reader.take("method", lambda value: value == METHOD, repr(METHOD))
        fits = reader.take("fits", lambda value: isinstance(value, list) and bool(value), "a list of fits")
        read = tuple(_read_fit(fit, block_size, f"{where}: fits[{index}]") for index, fit in enumerate(fits))
        rising = [fit.sampling_temperature for fit in read]
        if sorted(set(rising)) != rising:
            raise BundleError(f"{where}: the fits' temperatures of sampling are {rising}, expected to rise; {_ADVICE}")
        return cls(read, _read_data(reader.take("data", _is_object, "an object"), f"{where}: data"), method)

    def to_json(self) -> dict[str, Any]:
        """The content of `calibration.json`; `from_json` gives an equal calibration back."""
        return {
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "fits": [
                {
                    "sampling_temperature": fit.sampling_temperature,
                    "temperatures": list(fit.scaling.temperatures),
                    "temperatures_below": list(fit.scaling.temperatures_below),
                    "biases": list(fit.scaling.biases),
                    "samples": list(fit.samples),
                    **{name: list(getattr(fit, name)) for name in _ERRORS},
                }
                for fit in self.fits
            ],
            "data": {
                "sha256": self.data.sha256,
                "prompts": self.data.prompts,
                "max_new_tokens": self.data.max_new_tokens,
                "seed": self.data.seed,
                "prompt_digests": list(self.data.prompt_digests),
            },
        }

    def at(self, sampling_temperature: float) -> Scaling:
        """The scaling for a request's temperature: interpolated between the two fits around it, the last beyond."""
        above = next((fit for fit in self.fits if fit.sampling_temperature >= sampling_temperature), self.fits[-1])
        below = self.fits[max(self.fits.index(above) - 1, 0)]
        if above is below or sampling_temperature >= above.sampling_temperature:
            return above.scaling
        span = above.sampling_temperature - below.sampling_temperature
        share = (sampling_temperature - below.sampling_temperature) / span

        def between(one: float, other: float) -> float:
            return one + share * (other - one)

        def between_slopes(one: float, other: float) -> float:
            return 1 / between(1 / one, 1 / other)  # the scaled logit is linear in slopes, not in temperatures

        one, other = below.scaling, above.scaling
        return Scaling(
            tuple(map(between_slopes, one.temperatures, other.temperatures)),
            tuple(map(between_slopes, one.temperatures_below, other.temperatures_below)),
            tuple(map(between, one.biases, other.biases)),
        )


_ADVICE = "delete it, or write it anew with `dspark-edge calibrate`"
_ERRORS = ("ece_before", "ece_after", "survival_ece_before", "survival_ece_after")


def _scaled(logit: float, above: float, below: float) -> float:
    if above == below:
        return logit / above
    rest = math.log1p(math.exp(-abs(logit)))  # softplus(z) is z + rest above 0, and rest below
    return (max(logit, 0.0) + rest) / above - (max(-logit, 0.0) + rest) / below


def _sigmoid(value: float) -> float:
    if value >= 0:
        return 1 / (1 + math.exp(-value))
    power = math.exp(value)  # of a negative number: cannot overflow
    return power / (1 + power)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type(): to Python a bool is an int


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_length(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


class _Reader:
    """Takes checked members out of a JSON object."""

    def __init__(self, where: str, data: Any) -> None:
        if not isinstance(data, dict):
            raise BundleError(f"{where} is damaged: it holds {type(data).__name__}, expected an object; {_ADVICE}")
        self._where, self._data = where, data

    def take(self, name: str, valid: Callable[[Any], bool], expected: str) -> Any:
        if name not in self._data:
            raise BundleError(f"{self._where} is damaged: {name!r} is missing; {_ADVICE}")
        value = self._data[name]
        if not valid(value):
            raise BundleError(f"{self._where} is damaged: {name!r} is {value!r:.60}, expected {expected}; {_ADVICE}")
        return value

    def take_row(self, name: str, size: int, valid: Callable[[Any], bool], expected: str) -> tuple[Any, ...]:
        """A list with one value for each position of the block."""
        row = self.take(name, lambda value: isinstance(value, list), "a list")
        if len(row) != size:
            raise BundleError(
                f"{self._where}: {name!r} has {len(row)} positions, the drafter's block has {size}; {_ADVICE}"
            )
        for value in row:
            if not valid(value):
                raise BundleError(f"{self._where} is damaged: {name!r} holds {value!r}, expected {expected}; {_ADVICE}")
        return tuple(row)


def _read_fit(data: Any, block_size: int, where: str) -> Fit:
    reader = _Reader(where, data)

    def positive(value: Any) -> bool:
        return _is_number(value) and value > 0

    temperatures, below = (
        reader.take_row(name, block_size, positive, "finite numbers above 0")
        for name in ("temperatures", "temperatures_below")
    )
    biases = reader.take_row("biases", block_size, _is_number, "finite numbers")
    errors = {
        name: reader.take_row(
            name, block_size, lambda value: value is None or (_is_number(value) and 0 <= value <= 1), "shares or null"
        )
        for name in _ERRORS
    }
    return Fit(
        sampling_temperature=float(
            reader.take("sampling_temperature", lambda value: _is_number(value) and value >= 0, "a number ≥ 0")
        ),
        scaling=Scaling(*(tuple(map(float, row)) for row in (temperatures, below, biases))),
        samples=reader.take_row("samples", block_size, _is_length, "whole numbers"),
        **errors,
    )


def _read_data(data: Any, where: str) -> CalibrationData:
    reader = _Reader(where, data)

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(map(_is_text, value))

    return CalibrationData(
        sha256=reader.take("sha256", _is_text, "a text"),
        prompts=reader.take("prompts", _is_count, "a whole number of at least 1"),
        prompt_digests=tuple(reader.take("prompt_digests", texts, "a list of texts")),
        max_new_tokens=reader.take("max_new_tokens", _is_count, "a whole number of at least 1"),
        seed=reader.take("seed", _is_length, "a whole number"),
    )
