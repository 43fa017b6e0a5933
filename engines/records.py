"""Records: dataclasses that are read from JSON strictly, guided by their fields' types, and written to it.

An unknown or missing key, a wrong type or a value out of range is a ``BundleError`` that names the key's path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Annotated, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from dspark_edge.engines.errors import BundleError

__all__ = ["Count", "Flag", "Positive", "Record", "at_least", "matching", "non_empty", "one_number_of", "one_of"]

R = TypeVar("R", bound="Record")


# Readers of one JSON value. ``Annotated[type, reader]`` attaches one to a field; ``where`` is the key's path.
def matching(pattern: str, expected: str) -> Callable[[object, str], str]:
    """Reads a string that matches a pattern."""

    def read(value: object, where: str) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII | re.DOTALL):
            raise BundleError(f"{where} is {_shown(value)}; expected {expected}")
        return value

    return read


def at_least(least: int) -> Callable[[object, str], int]:
    """Reads an integer with a lower bound."""

    def read(value: object, where: str) -> int:
        if type(value) is not int or value < least:  # not isinstance: to Python a bool is an int
            raise BundleError(f"{where} is {_shown(value)}; expected an integer of at least {least}")
        return value

    return read


def one_of(allowed: Sequence[str]) -> Callable[[object, str], str]:
    """Reads one of some strings."""

    def read(value: object, where: str) -> str:
        if not isinstance(value, str) or value not in allowed:
            choices = " or ".join(json.dumps(choice) for choice in allowed)
            raise BundleError(f"{where} is {_shown(value)}; expected {choices}")
        return value

    return read


def one_number_of(allowed: Sequence[int]) -> Callable[[object, str], int]:
    """Reads one of some integers."""

    def read(value: object, where: str) -> int:
        if type(value) is not int or value not in allowed:
            raise BundleError(f"{where} is {_shown(value)}; expected {' or '.join(map(str, allowed))}")
        return value

    return read


non_empty = matching(".+", "a non-empty string")


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise BundleError(f"{where} is {_shown(value)}; expected true or false")
    return value


Count = Annotated[int, at_least(0)]
Positive = Annotated[int, at_least(1)]
Flag = Annotated[bool, _flag]


@dataclass(frozen=True)
class Record:
    """A dataclass that is read from and written to a JSON object.

    Every field is a key that must be there, but for fields with a default: they may be absent, and are left out where
    they have it, so that a key can be added without making older files, or files that do not need it, invalid.
    """

    __slots__ = ()

    @classmethod
    def from_json(cls: type[R], data: object, where: str = "manifest") -> R:
        """The record in a parsed JSON value; ``where`` is its path in messages.

        Raises:
            BundleError: it breaks the schema; the message names the key's path.
        """
        data = _object(data, where)
        cls._check_version(data, where)
        hints = get_type_hints(cls, include_extras=True)
        for key in sorted((hints.keys() ^ data.keys()) - cls._optional().keys()):
            problem = "is missing" if key in hints else "is not known to this version"
            raise BundleError(f"{where}: the key {key!r} {problem}")
        given = {key: hint for key, hint in hints.items() if key in data}
        record = cls(**{key: _read(hint, data[key], f"{where}.{key}") for key, hint in given.items()})
        record._check(where)
        return record

    def to_json(self) -> dict[str, object]:
        """The record as JSON values; ``from_json`` gives an equal one back."""
        return cast("dict[str, object]", _plain(self))

    @classmethod
    def _check_version(cls, data: Mapping[str, object], where: str) -> None:
        """Raise ``BundleError`` where an object was written by a newer version, whose keys may be unknown here."""

    def _check(self, where: str) -> None:
        """Raise ``BundleError`` where fields that are right alone contradict each other."""

    @classmethod
    def _optional(cls) -> dict[str, object]:
        """The keys that may be absent, and the values that stand for that."""
        return {field.name: field.default for field in fields(cls) if field.default is not MISSING}


def _read(hint: object, value: object, where: str) -> object:
    """``value`` as the type ``hint`` says, or a ``BundleError``."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return args[1](value, where)
    if origin is Literal:
        return one_of(args)(value, where)
    if origin in (Union, UnionType):  # only ever ``X | None``
        return None if value is None else _read(args[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise BundleError(f"{where} is {_shown(value)}; expected a list")
        return tuple(_read(args[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping:
        return {key: _read(args[1], item, f"{where}.{key}") for key, item in _object(value, where).items()}
    if hint is str:
        return non_empty(value, where)
    if isinstance(hint, type) and issubclass(hint, Record):
        return hint.from_json(value, where)
    raise TypeError(f"{where} has a type that records cannot hold: {hint}")


def _object(value: object, where: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise BundleError(f"{where} is {_shown(value)}; expected an object with named members")
    return value


def _plain(value: object) -> object:
    """Records, mappings and tuples as JSON values."""
    if isinstance(value, Record):
        optional = value._optional()
        items = {field.name: getattr(value, field.name) for field in fields(value)}
        return {key: _plain(item) for key, item in items.items() if key not in optional or item != optional[key]}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return value


def _shown(value: object) -> str:
    shown = json.dumps(value, default=repr)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
