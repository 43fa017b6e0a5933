"""How a batch generator decodes, and what it is opened with."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.batching.executor import EXECUTIONS
from dspark_edge.runtime.generator import MODES

__all__ = ["BatchOptions"]


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """How a batch generator decodes.

    Raises:
        InvalidInputError: an option is unknown or out of range.
    """

    mode: str = "static"  # plain | static | scheduled
    verify_length: int | None = None  # draft tokens verified a round in static mode; None: the whole block
    slots: int = 8  # most requests that are answered at once
    queue: int = 64  # most requests that wait for a slot
    prefill_chunk: int = 64  # most prompt tokens a call; what others wait for between two rounds
    execution: str = "auto"  # auto | dense | serial, see `choose_grouping`

    def __post_init__(self) -> None:
        for name, value, known in (("mode", self.mode, MODES), ("execution", self.execution, EXECUTIONS)):
            if value not in known:
                raise InvalidInputError(f"unknown {name} {value!r}; choose one of: {', '.join(known)}")
        for name in ("slots", "queue", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.verify_length is not None and self.mode != "static":
            raise InvalidInputError(
                f"verify_length is of mode 'static', the mode is {self.mode!r}; give one of the two"
            )
        if self.verify_length is not None and self.verify_length < 1:
            raise InvalidInputError(f"verify_length is {self.verify_length}, expected at least 1 (or mode 'plain')")
