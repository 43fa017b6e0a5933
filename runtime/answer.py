"""An answer in the making: what rounds commit, cut at the request's end and turned into text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dspark_edge.runtime.detokenizer import IncrementalDetokenizer
from dspark_edge.runtime.sampling import SamplingParams
from dspark_edge.runtime.sequence import Sequence
from dspark_edge.runtime.statistics import Statistics, Tally
from dspark_edge.runtime.tokenizer import Tokenizer

__all__ = ["Answer", "Generation"]


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer."""

    token_ids: tuple[int, ...]  # new ids only; the end-of-text id that ended it included
    text: str  # without special tokens and without the stop text
    finish_reason: str  # stop | length | cancelled
    log_probs: tuple[float, ...]  # of token_ids, under the target, before temperature and filters
    statistics: Statistics

    def to_json(self) -> dict[str, Any]:
        return {
            "token_ids": list(self.token_ids),
            "text": self.text,
            "finish_reason": self.finish_reason,
            "stats": self.statistics.to_json(),
        }


class Answer:
    """Cuts what rounds commit at the request's end, and turns it into text."""

    def __init__(
        self,
        sequence: Sequence,
        params: SamplingParams,
        eos_ids: frozenset[int],
        capacity: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._sequence = sequence
        self._stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
        limit = capacity + 1 - sequence.prompt_length  # the last token needs no slot
        self._limit = limit if params.max_new_tokens is None else min(params.max_new_tokens, limit)
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.stop) if tokenizer is not None else None
        self._taken = 0
        self._text = ""
        self.last_ids: tuple[int, ...] = ()
        self.finish_reason: str | None = None

    def take_in(self) -> str:
        """Judge the tokens committed since the last call; drop those behind the end. Returns the new text."""
        sequence = self._sequence
        fresh = sequence.new_ids[self._taken :]
        keep = min(len(fresh), self._limit - self._taken)
        for count, token in enumerate(fresh[:keep], start=1):
            if token in self._stop_ids:
                keep, self.finish_reason = count, "stop"
                break
        text = ""
        if self._detokenizer is not None:
            text = self._detokenizer.push(fresh[:keep])
            if self._detokenizer.stopped and self._detokenizer.stop_token_count is not None:
                keep, self.finish_reason = self._detokenizer.stop_token_count - self._taken, "stop"
        self._taken += keep
        if self.finish_reason is None and self._taken >= self._limit:
            self.finish_reason = "length"
        sequence.rollback_to(sequence.prompt_length + self._taken)
        self.last_ids = tuple(fresh[:keep])
        self._text += text
        return text

    def finish_text(self) -> str:
        """Text that was held back and is certain now."""
        rest = self._detokenizer.finish() if self._detokenizer is not None else ""
        self._text += rest
        return rest

    def result(self, tally: Tally) -> Generation:
        new_ids = tuple(self._sequence.new_ids)
        return Generation(
            new_ids,
            self._text,
            self.finish_reason or "stop",
            tuple(self._sequence.log_probs),
            tally.result(len(new_ids)),
        )
