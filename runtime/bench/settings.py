"""What a bench measures, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.generator import MODES

__all__ = ["BenchOptions", "Mode", "parse_mode", "rotated"]


@dataclass(frozen=True, slots=True)
class Mode:
    """How a contender decodes."""

    name: str  # plain | static | scheduled
    verify_length: int | None = None  # of static; None: the whole block

    def __str__(self) -> str:
        return self.name if self.verify_length is None else f"{self.name}:{self.verify_length}"


def parse_mode(text: str) -> Mode:
    """A mode as it is written: plain, static, static:3, scheduled.

    Raises:
        InvalidInputError: there is no such mode.
    """
    name, colon, length = text.strip().partition(":")
    if name not in MODES or (colon and (name != "static" or not length.isdecimal() or int(length) < 1)):
        raise InvalidInputError(
            f"unknown mode {text.strip()!r}; choose from {', '.join(MODES)}, or static:3 for a fixed verify length of 3"
        )
    return Mode(name, int(length) if colon else None)


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """How a bench measures.

    Raises:
        InvalidInputError: a value is out of range, or a mode is given twice.
    """

    modes: tuple[Mode, ...] = (Mode("plain"), Mode("static"), Mode("scheduled"))
    concurrencies: tuple[int, ...] = (1,)
    temperatures: tuple[float, ...] = (0.0,)
    max_new_tokens: int = 64
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("modes", bool(self.modes) and len(set(self.modes)) == len(self.modes), "one or more, each once"),
            ("concurrency", bool(self.concurrencies) and min(self.concurrencies, default=0) >= 1, "1 or more"),
            ("temperature", bool(self.temperatures) and min(self.temperatures, default=-1.0) >= 0, "0 or more"),
            ("max_new_tokens", self.max_new_tokens >= 2, "2 or more: the first one is the prefill's"),
            ("repeats", self.repeats >= 1, "1 or more"),
            ("seed", self.seed >= 0, "0 or more"),
        )
        for name, valid, expected in checks:
            if not valid:
                found = getattr(self, {"concurrency": "concurrencies", "temperature": "temperatures"}.get(name, name))
                raise InvalidInputError(f"{name} is {_written(found)}, expected {expected}")


def rotated(count: int, turn: int) -> list[int]:
    """0 … count − 1 from another one on each turn: whoever is first after a pause is not always the same."""
    return [(turn + index) % count for index in range(count)]


def _written(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value)) or "empty"
    return str(value)
