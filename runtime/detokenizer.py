"""Token ids to text while they are being generated, and stop strings.

Decoding one token at a time is wrong: a character may be spread over several tokens, and many decoders treat
the start of a text differently (they strip its leading space). So a short window is decoded again with every
token: the tokens not settled yet, and before them the last settled ones as context. Of its text, what was
emitted before is skipped. The window stays short, so a token costs the same however long the text is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from dspark_edge.engines.errors import InvalidInputError

__all__ = ["IncrementalDetokenizer", "StopMatcher", "TokenDecoder"]

_REPLACEMENT = "\ufffd"
_LONGEST_WINDOW = 16  # tokens; only a run of broken characters gets there
_SMALLEST_TAIL = 4  # tokens; as many as a UTF-8 character has bytes, so the tail's beginning is settled


class TokenDecoder(Protocol):
    """What a detokenizer needs of a tokenizer; :class:`~dspark_edge.runtime.tokenizer.Tokenizer` has it."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest token id."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids that decoding may leave out."""

    @property
    def byte_values(self) -> Mapping[int, int]:
        """Token id to byte in a byte-fallback vocabulary."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids."""


class StopMatcher:
    """Finds the stop string that is completed first in a text that arrives in pieces.

    Each stop string has a Knuth-Morris-Pratt automaton, so a character costs the same whatever came before.
    Of stop strings completed by the same character the longest counts, so the least text is let through.

    Args:
        stops: strings that end a text.

    Raises:
        InvalidInputError: ``stops`` is one string rather than several, or one is empty or no string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str):
            raise InvalidInputError(f"stop strings must be a list of strings, not the string {stops!r}")
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise InvalidInputError(f"a stop string must be a string of at least one character, not {stop!r}")
        self._stops = sorted(dict.fromkeys(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """Take in more text; give back what cannot be part of a stop string. After a match, nothing."""
        if not self._stops or self.matched is not None:
            return piece if self.matched is None else ""
        text = self._held + piece
        for position, character in enumerate(piece, start=len(self._held) + 1):
            for index, stop in enumerate(self._stops):
                self._states[index] = _advance(stop, self._borders[index], self._states[index], character)
                if self._states[index] == len(stop):
                    self.matched, self._held = stop, ""
                    return text[: position - len(stop)]
        certain = len(text) - max(self._states)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """The text held back, when no more is to come."""
        held, self._held = self._held, ""
        return held


class IncrementalDetokenizer:
    """Turns generated token ids into text that never has to be taken back.

    Nothing is emitted that later tokens could change: not half a character, and not what may be the beginning
    of a stop string. All that is emitted, joined, is ``tokenizer.decode`` of all ids, or that text up to the
    stop string. One exception: a byte-fallback decoder replaces *every* byte of a run that turns out invalid;
    here the characters of such a run that were complete stay as they are.

    Args:
        tokenizer: decodes the ids.
        stop: strings that end the text; the one completed first counts and is not part of the text.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        InvalidInputError: a stop string is empty, or ``stop`` is a single string.
    """

    def __init__(self, tokenizer: TokenDecoder, stop: Sequence[str] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ignored = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._matcher = StopMatcher(stop)
        self._pieces: list[str] = []
        self._window: list[int] = []
        self._fresh = 0  # index in the window of the first token that is not settled
        self._emitted = ""  # the part of the window's text that is out already
        self._finished = False
        self.token_count = 0
        self.stop_token_count: int | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was completed; from then on nothing is emitted."""
        return self._matcher.matched is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that was completed, or None."""
        return self._matcher.matched

    @property
    def text(self) -> str:
        """All text emitted so far."""
        return "".join(self._pieces)

    def push(self, ids: Iterable[int]) -> str:
        """Take in generated ids, one after another, and give back the text that is now certain.

        ``token_count`` counts the ids taken in. When one completes a stop string, ``stop_token_count`` is the
        count up to and including that id, and the ids after it are dropped.

        Raises:
            InvalidInputError: an id is no token id, or ``finish`` was called before.
        """
        if self._finished:
            raise InvalidInputError("this detokenizer is finished; make a new one for another text")
        pieces: list[str] = []
        for token_id in ids:
            if self.stopped:
                break
            self.token_count += 1
            pieces.append(self._release(self._next_piece(token_id)))
        return "".join(pieces)

    def finish(self) -> str:
        """The end of the text: what was held back, an unfinished character as U+FFFD. Later calls give ""."""
        if self._finished or self.stopped:
            self._finished = True
            return ""
        self._finished = True
        text = self._decode(self._window)
        settled = text.startswith(self._emitted)
        last = text[len(self._emitted) :] if settled else self._decode(self._window[self._fresh :])
        piece = self._release(last)
        rest = self._matcher.finish()
        if rest:
            self._pieces.append(rest)
        return piece + rest

    def _release(self, piece: str) -> str:
        """Pass text by the stop strings; keep and give back what they let through."""
        piece = self._matcher.push(piece)
        if self.stopped:
            self.stop_token_count = self.token_count
        if piece:
            self._pieces.append(piece)
        return piece

    def _next_piece(self, token_id: int) -> str:
        """The text that one more token makes certain."""
        if token_id in self._ignored or token_id >= self._tokenizer.vocab_size:
            return ""  # decode() leaves it out, so it is no context either
        self._window.append(token_id)
        pending = self._pending_bytes()
        if pending and _is_unfinished(pending):
            return ""
        text = self._decode(self._window)
        if not text.startswith(self._emitted):
            # The new token changed how its context reads (a byte run turned invalid): go on without context.
            self._window, self._fresh, self._emitted = self._window[self._fresh :], 0, ""
            text = self._decode(self._window)
        certain = len(text)
        if text.endswith(_REPLACEMENT) and not self._tokenizer.byte_values:
            # An unfinished character at the end reads as one U+FFFD; those before it are there to stay.
            certain -= 1
        piece = text[len(self._emitted) : certain]
        if certain < len(text):
            self._emitted += piece
            self._shorten(text)
        elif piece:
            self._window = self._window[self._fresh :]
            self._fresh = len(self._window)
            self._emitted = self._decode(self._window)
        return piece

    def _pending_bytes(self) -> bytes:
        """The bytes of the byte-fallback tokens at the end of what is not settled."""
        values = self._tokenizer.byte_values
        start = len(self._window)
        while start > self._fresh and self._window[start - 1] in values:
            start -= 1
        return bytes(values[token_id] for token_id in self._window[start:])

    def _shorten(self, text: str) -> None:
        """Cut a long run of broken characters where both parts decode to the whole: between characters."""
        if len(self._window) <= _LONGEST_WINDOW:
            return
        # Among four neighbouring places between tokens at least one is no inside of a UTF-8 character.
        for tail in range(_SMALLEST_TAIL, 2 * _SMALLEST_TAIL):
            after = self._decode(self._window[-tail:])
            if self._decode(self._window[:-tail]) + after == text:
                self._window, self._fresh, self._emitted = self._window[-tail:], 0, after[:-1]
                return

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)


def _is_unfinished(data: bytes) -> bool:
    """Whether more bytes could still make valid UTF-8 of these, which now end inside a character."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False


def _borders(pattern: str) -> list[int]:
    """For each prefix of a pattern, the length of its longest proper prefix that is its suffix too."""
    borders = [0] * len(pattern)
    for index in range(1, len(pattern)):
        length = borders[index - 1]
        while length and pattern[index] != pattern[length]:
            length = borders[length - 1]
        borders[index] = length + (pattern[index] == pattern[length])
    return borders


def _advance(pattern: str, borders: Sequence[int], state: int, character: str) -> int:
    """Characters of the pattern matched after one more character; ``state`` were matched before it."""
    while state and pattern[state] != character:
        state = borders[state - 1]
    return state + (pattern[state] == character)
