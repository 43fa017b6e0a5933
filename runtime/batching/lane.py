"""A request that has a slot."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_edge.runtime.answer import Answer, Generation
from dspark_edge.runtime.batching.policy import Member
from dspark_edge.runtime.batching.ticket import Event, Ticket
from dspark_edge.runtime.round import Request
from dspark_edge.runtime.scheduling import SequenceState
from dspark_edge.runtime.statistics import Tally

__all__ = ["Lane"]


@dataclass(slots=True, eq=False)
class Lane:
    """A request being answered, from its admission to its end."""

    ticket: Ticket
    request: Request
    answer: Answer
    tally: Tally
    state: SequenceState | None = None  # what scheduling remembers of it
    decoding: bool = False  # whether its prompt is cached

    @property
    def cache_length(self) -> int:
        return self.request.sequence.cache_length

    @property
    def unread(self) -> int:
        """Tokens of the prompt that are not cached yet."""
        sequence = self.request.sequence
        return len(sequence.token_ids) - sequence.cache_length

    def member(self, capacity: int) -> Member:
        """As it enters a round."""
        return Member(self.request.params, self.state, self.cache_length, capacity - self.cache_length - 1)

    def take_in(self) -> Event:
        """What was committed since the last event; with the whole answer if that ends it."""
        text = self.answer.take_in()
        if self.answer.finish_reason is None:
            return Event(self.ticket.request_id, self.answer.last_ids, text)
        return self._ended(self.answer.last_ids, text)

    def cancel(self) -> Event:
        """End the answer where it is."""
        self.answer.finish_reason = "cancelled"
        return self._ended((), "")

    def _ended(self, token_ids: tuple[int, ...], text: str) -> Event:
        text += self.answer.finish_text()
        generation: Generation = self.answer.result(self.tally)
        return Event(self.ticket.request_id, token_ids, text, generation)
