"""How a batch generator decodes, and what it is opened with."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.batching.executor import EXECUTIONS
from dspark_edge.runtime.bit_exact import chunk_of
from dspark_edge.runtime.generator import MODES

__all__ = ["BatchOptions"]

_PREFILL_CHUNK = 64


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
    # prompt tokens a call, which others wait for between two rounds; None: 64, and fewer where that stalls them
    prefill_chunk: int | None = None
    execution: str = "auto"  # auto | dense | serial | packed, see `choose_grouping`
    bit_exact: bool = False  # answers do not depend on how and beside whom they were decoded; see docs/bit-exact.md

    def __post_init__(self) -> None:
        for name, value, known in (("mode", self.mode, MODES), ("execution", self.execution, EXECUTIONS)):
            if value not in known:
                raise InvalidInputError(f"unknown {name} {value!r}; choose one of: {', '.join(known)}")
        chunk_of(self.prefill_chunk, _PREFILL_CHUNK, self.bit_exact)
        for name in ("slots", "queue"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.verify_length is not None and self.mode != "static":
            raise InvalidInputError(
                f"verify_length is of mode 'static', the mode is {self.mode!r}; give one of the two"
            )
        if self.verify_length is not None and self.verify_length < 1:
            raise InvalidInputError(f"verify_length is {self.verify_length}, expected at least 1 (or mode 'plain')")
        if self.bit_exact and self.execution != "auto":
            raise InvalidInputError(
                f"execution is {self.execution!r}, but bit_exact makes a call for each request; give one of the two"
            )

    @property
    def chunk(self) -> int:
        """Most prompt tokens a call."""
        return chunk_of(self.prefill_chunk, _PREFILL_CHUNK, self.bit_exact)

    @property
    def paced(self) -> bool:
        """Whether chunks follow what they cost those who decode."""
        return self.prefill_chunk is None and not self.bit_exact
