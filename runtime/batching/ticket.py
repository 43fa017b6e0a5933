"""A request as its sender sees it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from time import perf_counter

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.answer import Generation

__all__ = ["Event", "Ticket"]


@dataclass(frozen=True, slots=True)
class Event:
    """What one step added to a request's answer."""

    request_id: int
    token_ids: tuple[int, ...]  # new ones; empty where a request was cancelled
    text: str  # may be empty: half a character, or the possible beginning of a stop text, is held back
    generation: Generation | None = None  # the whole answer, with the last event only


@dataclass(slots=True, eq=False)
class Ticket:
    """A request's handle; its methods may be called from any thread."""

    request_id: int
    prompt_tokens: int
    submitted_at: float = field(default_factory=perf_counter)
    _cancelled: threading.Event = field(default_factory=threading.Event, repr=False)
    _done: threading.Event = field(default_factory=threading.Event, repr=False)
    _generation: Generation | None = field(default=None, repr=False)
    _error: BaseException | None = field(default=None, repr=False)

    def cancel(self) -> None:
        """End the request at the beginning of the next step, wherever it is. Does nothing to one that has ended."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether it was asked to end; it may have come to its end by itself before."""
        return self._cancelled.is_set()

    @property
    def done(self) -> bool:
        """Whether there is an answer or an error."""
        return self._done.is_set()

    @property
    def error(self) -> BaseException | None:
        """What ended it before its answer did; None while it runs, or when it has its answer."""
        return self._error

    def result(self, timeout: float | None = 0.0) -> Generation:
        """The answer.

        Args:
            timeout: seconds to wait for it while another thread steps the generator; None: as long as it takes.

        Raises:
            InvalidInputError: it has not ended yet.
            DSparkError: whatever ended it, such as an `EngineError`, or `ClosedError`.
        """
        if not self._done.wait(timeout):
            raise InvalidInputError(f"request {self.request_id} has not ended; step the generator until it has")
        if self._generation is None:
            raise self._error or RuntimeError(f"request {self.request_id} ended without answer or error")
        return self._generation

    def finish(self, generation: Generation) -> None:
        """For the generator: the request has its answer."""
        self._generation = generation
        self._done.set()

    def fail(self, error: BaseException) -> None:
        """For the generator: the request ends without an answer."""
        self._error = error
        self._done.set()
