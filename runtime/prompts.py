"""Prompts in a JSON Lines file, as every command that takes `--prompts` reads them.

A line holds one of `prompt` (a text), `turns` (what the user says, turn by turn), `messages` (a conversation of
`{role, content}`) or `token_ids`, and may name its `domain`. Other members are left alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.chat_template import Message

__all__ = ["DEFAULT_DOMAIN", "PromptRecord", "hash_prompts", "read_prompt_records"]

DEFAULT_DOMAIN = "default"
"""The domain of a line that names none."""

_EXPECTED = (
    "expected an object with a text 'prompt', a list of texts 'turns', a list 'messages' of {role, content}, "
    "or a list of numbers 'token_ids'"
)


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """One line of a prompts file; exactly one of `turns`, `messages` and `token_ids` is filled."""

    line: int  # 1-based
    domain: str
    turns: tuple[str, ...] = ()  # the user's texts; a model's answers come between them
    messages: tuple[Message, ...] = ()
    token_ids: tuple[int, ...] = ()

    @property
    def num_turns(self) -> int:
        """How many answers are asked for."""
        return max(len(self.turns), 1)

    @property
    def opening(self) -> str | list[int] | list[Message]:
        """What the model is given first, as `Generator.stream` takes it; of `turns` the first one."""
        if self.token_ids:
            return list(self.token_ids)
        return list(self.messages) if self.messages else self.turns[0]

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the opening's sha256: equal where two prompts open with the same words or ids."""
        said: list[Any] = list(self.token_ids)
        if not said:  # a text alone is what a single message of the user is
            messages = self.messages or (Message("user", self.turns[0]),)
            said = [[message.role, message.content] for message in messages]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def read_prompt_records(path: Path) -> list[PromptRecord]:
    """The prompts of a file, in its order; empty lines are skipped.

    Raises:
        InvalidInputError: the file cannot be read, holds no prompts, or a line is broken; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"cannot read the prompts {path}: {error}") from None
    records: list[PromptRecord] = []
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also cut inside a JSON string
        if line.strip():
            try:
                records.append(_parse(json.loads(line), number))
            except (ValueError, RecursionError) as error:
                raise InvalidInputError(f"{path}, line {number}: {error}; {_EXPECTED}") from None
    if not records:
        raise InvalidInputError(f"{path} holds no prompts")
    return records


def hash_prompts(records: Sequence[PromptRecord]) -> str:
    """The sha256 of what the records say, in their order, whatever the file looks like otherwise."""
    digest = hashlib.sha256()
    for record in records:
        messages = [[message.role, message.content] for message in record.messages]
        said = [record.domain, list(record.turns), messages, list(record.token_ids)]
        digest.update(json.dumps(said).encode() + b"\n")
    return digest.hexdigest()


def _parse(entry: Any, line: int) -> PromptRecord:
    if not isinstance(entry, dict):
        raise ValueError(f"it holds {type(entry).__name__}")
    domain = entry.get("domain", DEFAULT_DOMAIN)
    if not isinstance(domain, str) or not domain:
        raise ValueError(f"the domain is {domain!r}, expected a text")
    if "token_ids" in entry:
        return PromptRecord(line, domain, token_ids=_token_ids(entry["token_ids"]))
    if "messages" in entry:
        return PromptRecord(line, domain, messages=_messages(entry["messages"]))
    if "prompt" in entry:
        return PromptRecord(line, domain, turns=_texts([entry["prompt"]]))
    if "turns" in entry:
        return PromptRecord(line, domain, turns=_texts(entry["turns"]))
    raise ValueError("it holds no prompt")


def _items(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name!r} is {value!r:.60}, expected a list that is not empty")
    return value


def _token_ids(value: Any) -> tuple[int, ...]:
    token_ids = _items(value, "token_ids")
    for token in token_ids:
        if type(token) is not int or token < 0:  # not isinstance: to Python a bool is an int
            raise ValueError(f"the token id {token!r:.60} is no whole number from 0 on")
    return tuple(token_ids)


def _messages(value: Any) -> tuple[Message, ...]:
    messages = []
    for message in _items(value, "messages"):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"the message {message!r:.60} is no object with 'role' and 'content'")
        messages.append(Message(message["role"], message["content"]))
    return tuple(messages)


def _texts(value: Any) -> tuple[str, ...]:
    texts = _items(value, "turns")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"the prompt is {text!r:.60}")
    return tuple(texts)
