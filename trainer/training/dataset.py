"""Responses as training sequences, split by prompt into a training and a held-out part."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.trainer.responses.writer import read_lines

__all__ = ["Example", "Split", "hash_examples", "read_examples", "split_examples"]

_EXPECTED = "expected 'prompt_ids' and 'response_ids', lists of token ids, as `dspark-edge respond` writes them"


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its response."""

    token_ids: np.ndarray  # [S] int32, prompt and response
    prompt_length: int
    domain: str
    group: str  # examples of one conversation share it: they are held out together
    greedy: bool  # the response is the target's argmax throughout
    earlier: tuple[tuple[int, int], ...] = ()  # answers inside the prompt that are trained on too: first, behind last

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def answers(self) -> tuple[tuple[int, int], ...]:
        """What is trained on, as ranges of positions: the earlier answers, and the response."""
        return (*self.earlier, (self.prompt_length, len(self)))


@dataclass(frozen=True, slots=True)
class Split:
    """What is trained on, and what is not."""

    train: list[Example]
    held_out: list[Example]


def read_examples(paths: Sequence[Path], vocab_size: int, max_length: int | None = None) -> list[Example]:
    """Read responses.

    Args:
        paths: JSON Lines files; of lines with a `kind`, only responses are taken. A last line that was cut off is
            left out.
        vocab_size: the target's.
        max_length: sequences are cut behind so many tokens; None: not at all.

    Raises:
        InvalidInputError: a file cannot be read, a line is broken or holds a token outside the vocabulary (the
            message names the line), or there is no response.
    """
    examples = [example for path in paths for example in _read_file(path, vocab_size, max_length)]
    if not examples:
        within = f" within {max_length} tokens" if max_length is not None else ""
        raise InvalidInputError(f"{', '.join(map(str, paths))} hold no responses of at least two tokens{within}")
    return examples


def _read_file(path: Path, vocab_size: int, max_length: int | None) -> list[Example]:
    """A file's responses, in their order; all turns of a conversation are of its first turn's group."""
    examples: list[Example] = []
    conversations: list[str] = []  # of each example
    openings: dict[str, Example] = {}
    try:
        for line in read_lines(path):
            if line.entry.get("kind", "response") != "response":
                continue
            example = _example(line.entry, vocab_size, max_length, f"{path}, line {line.number}")
            said = f"{line.entry.get('plan')} {line.entry['prompt']}" if "prompt" in line.entry else example.group
            if said not in openings or example.prompt_length < openings[said].prompt_length:
                openings[said] = example
            if len(example) - example.prompt_length >= 2:  # an anchor, and something to draft
                examples.append(example)
                conversations.append(said)
    except OSError as error:
        raise InvalidInputError(f"cannot read the responses {path}: {error.strerror or error}") from None
    groups = [openings[said].group for said in conversations]
    grouped = [replace(example, group=group) for example, group in zip(examples, groups, strict=True)]
    return _join_turns(grouped, conversations)


def _join_turns(examples: list[Example], conversations: list[str]) -> list[Example]:
    """A turn that is repeated in a later turn's prompt is trained on there: its features are computed once."""
    turns: dict[str, list[int]] = {}
    for index, said in enumerate(conversations):
        turns.setdefault(said, []).append(index)
    joined: dict[int, Example] = dict(enumerate(examples))
    for indices in turns.values():
        # A turn goes to the next longer one; that one, with all that it took up, to the next.
        ordered = sorted(indices, key=lambda index: (len(examples[index]), index))
        for place, earlier in enumerate(ordered):
            for later in ordered[place + 1 :]:
                end = _repeated(joined[earlier], joined[later])
                if end is not None:
                    taken = joined.pop(earlier)
                    spans = (*taken.earlier, (taken.prompt_length, end))
                    joined[later] = replace(joined[later], earlier=spans)
                    break
    return [joined[index] for index in sorted(joined)]


def _repeated(turn: Example, later: Example) -> int | None:
    """Where a turn ends in a later one's prompt, or None where that does not begin with it.

    Its last token may differ: an answer that was cut off there may have ended in half a word.
    """
    if later.earlier or turn.greedy != later.greedy or len(turn) > later.prompt_length:
        return None
    differ = np.flatnonzero(turn.token_ids != later.token_ids[: len(turn)])
    if len(differ) == 0:
        return len(turn)
    return len(turn) - 1 if differ[0] == len(turn) - 1 > turn.prompt_length + 1 else None


def _example(entry: dict[str, Any], vocab_size: int, max_length: int | None, where: str) -> Example:
    """A line as an example, its prompt's ids as the group."""
    prompt, response = (_token_ids(entry.get(key), key, vocab_size, where) for key in ("prompt_ids", "response_ids"))
    if not prompt:
        raise InvalidInputError(f"{where}: 'prompt_ids' is empty; {_EXPECTED}")
    token_ids = np.array((prompt + response)[:max_length], dtype=np.int32)
    group = hashlib.sha256(np.array(prompt, dtype=np.int32).tobytes()).hexdigest()[:16]
    return Example(token_ids, len(prompt), str(entry.get("domain", "default")), group, entry.get("temperature") == 0)


def _token_ids(value: Any, key: str, vocab_size: int, where: str) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int for token in value):
        raise InvalidInputError(f"{where}: {key!r} is {value!r:.40}; {_EXPECTED}")
    for token in value:
        if not 0 <= token < vocab_size:
            raise InvalidInputError(
                f"{where}: token id {token} in {key!r} is outside the target's vocabulary of {vocab_size} tokens; "
                "give responses of this target"
            )
    return value


def split_examples(examples: Sequence[Example], held_out: float, most: int = 512) -> Split:
    """Hold out a share of the prompts, whatever their order in the files.

    Args:
        examples: responses to at least two prompts.
        held_out: the share; at least one prompt is held out, and at least one is not.
        most: no more prompts are held out when these have so many responses.

    Raises:
        InvalidInputError: one side would be empty.
    """
    if not 0 < held_out < 1:
        raise InvalidInputError(f"the held-out share is {held_out}, expected between 0 and 1")
    sizes = Counter(example.group for example in examples)
    if len(sizes) < 2:
        raise InvalidInputError(
            f"the {len(examples)} response(s) are to {len(sizes)} prompt(s), expected at least two: one to train on, "
            "one to hold out; give responses to more prompts"
        )
    ranked = sorted(sizes, key=lambda group: hashlib.sha256(group.encode()).digest())
    wanted = min(max(1, round(held_out * len(ranked))), len(ranked) - 1)
    chosen, held = set(ranked[:1]), sizes[ranked[0]]
    for group in ranked[1:wanted]:
        if held + sizes[group] > most:
            break
        chosen.add(group)
        held += sizes[group]
    aside = [example for example in examples if example.group in chosen]
    train = [example for example in examples if example.group not in chosen]
    return Split(train, aside)


def hash_examples(examples: Sequence[Example]) -> str:
    """sha256 of what is trained on."""
    digest = hashlib.sha256()
    for example in examples:
        bounds = [len(example), example.prompt_length, *chain.from_iterable(example.earlier)]
        digest.update(np.array(bounds, dtype=np.int64).tobytes())
        digest.update(example.token_ids.tobytes())
    return digest.hexdigest()
