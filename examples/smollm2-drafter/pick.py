"""Which answers a part of the training takes, from all that there are.

python pick.py PART picked.jsonl responses.jsonl … [--unseen PICKED.jsonl]

A file is known by what stands before `-responses`, the one without by `first`. What the part before left weak weighs
most: in the second part functions to be completed and conversation, answered greedily; in those after it conversations
of two turns, on other subjects each; the sixth takes what is left, most of it sums, and `again` some of the others
beside it; the seventh is other sums, and `beside` what the sixth did not take again; the eighth is other answers of all
kinds, and `among` functions and problems that neither took again. Long sequences are mostly left out of the second,
because their features take the time of two short ones; the others have them, because a drafter is no better at a depth
than what it has seen of it. The confidence head is trained on answers that no part has seen, since what a drafter knows
by heart says nothing of its chances: `--unseen` names what the parts before have picked, and what later ones shall
leave to it.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHORTEST_ANSWER = 24


@dataclass(frozen=True)
class Part:
    """A part of the training."""

    tokens: dict[tuple[str, str, float], float]  # (file, domain, temperature) → most tokens, prompts included
    longest: int  # tokens of a sequence
    usually_long: int  # from so many tokens on, one in seven stays
    long: dict[str, int] = field(default_factory=dict)  # other such numbers, by file
    twice: tuple[str, ...] = ()  # files that an epoch sees twice


PARTS = {
    "second": Part(
        {
            ("library", "code", 0.0): 128e3,
            ("more", "chat", 0.0): 75e3,
            ("more", "chat", 1.0): 25e3,
            ("first", "chat", 0.0): 22e3,
            ("more", "math", 0.0): 25e3,
            ("more", "code", 0.0): 14e3,
            ("more", "code", 1.0): 14e3,
            ("more", "synthesised", 0.0): 6e3,
            ("more", "synthesised", 1.0): 3e3,
            ("boxed", "math", 0.0): 30e3,
            ("boxed", "math", 1.0): 5e3,
            ("first", "math", 0.0): 8e3,
            ("first", "code", 0.0): 6e3,
        },
        longest=400,
        usually_long=270,
        long={"library": 330, "boxed": 400},
    ),
    "third": Part(
        {
            ("conversation", "chat", 0.0): 600e3,  # all there are, by turn
            ("conversation", "chat", 1.0): 100e3,
            ("function", "code", 0.0): 60e3,
            ("library", "code", 0.0): 80e3,
            ("more", "code", 0.0): 10e3,
            ("more", "chat", 0.0): 42e3,
            ("more", "chat", 1.0): 12e3,
            ("first", "chat", 0.0): 14e3,
            ("boxed", "math", 0.0): 30e3,
            ("first", "math", 0.0): 8e3,
        },
        longest=560,
        usually_long=560,
        twice=("conversation",),
    ),
    "fourth": Part(
        {
            ("subject", "chat", 0.0): 600e3,  # all there are, by turn
            ("subject", "chat", 1.0): 100e3,
            ("own", "synthesised", 0.0): 100e3,
            ("conversation", "chat", 0.0): 60e3,
            ("more", "chat", 0.0): 15e3,
            ("library", "code", 0.0): 40e3,
            ("function", "code", 0.0): 15e3,
            ("boxed", "math", 0.0): 25e3,
            ("first", "math", 0.0): 5e3,
        },
        longest=600,
        usually_long=600,
    ),
    "fifth": Part(
        {
            ("lengthy", "chat", 0.0): 600e3,  # all there are, by turn
            ("lengthy", "chat", 1.0): 100e3,
            ("lengthy", "synthesised", 0.0): 100e3,
            ("routine", "code", 0.0): 50e3,  # all there are
            ("subject", "chat", 0.0): 40e3,
            ("more", "chat", 0.0): 15e3,
            ("library", "code", 0.0): 50e3,
            ("function", "code", 0.0): 15e3,
            ("boxed", "math", 0.0): 25e3,
            ("first", "math", 0.0): 5e3,
        },
        longest=600,
        usually_long=600,
    ),
    "sixth": Part(  # with --unseen of all parts before
        {
            ("more", "math", 0.0): 200e3,
            ("more", "math", 1.0): 50e3,
            ("more", "code", 1.0): 100e3,
            ("more", "code", 0.0): 20e3,
            ("more", "chat", 1.0): 60e3,
            ("more", "chat", 0.0): 60e3,
        },
        longest=600,
        usually_long=380,
    ),
    "again": Part(  # beside the sixth, which has no conversation of two turns
        {
            ("lengthy", "chat", 0.0): 60e3,
            ("subject", "chat", 0.0): 35e3,
            ("conversation", "chat", 0.0): 35e3,
            ("lengthy", "synthesised", 0.0): 15e3,
            ("library", "code", 0.0): 35e3,
            ("routine", "code", 0.0): 15e3,
            ("function", "code", 0.0): 10e3,
            ("boxed", "math", 0.0): 15e3,
        },
        longest=600,
        usually_long=600,
    ),
    "seventh": Part(
        {("sums", "math", 0.0): 600e3},  # all there are
        longest=600,
        usually_long=600,
    ),
    "beside": Part(  # beside the seventh, with --unseen of what went beside the sixth
        {
            ("lengthy", "chat", 0.0): 60e3,
            ("subject", "chat", 0.0): 45e3,
            ("conversation", "chat", 0.0): 35e3,
            ("lengthy", "synthesised", 0.0): 15e3,
            ("more", "chat", 0.0): 20e3,
            ("library", "code", 0.0): 45e3,
            ("routine", "code", 0.0): 15e3,
            ("function", "code", 0.0): 10e3,
        },
        longest=600,
        usually_long=600,
    ),
    "eighth": Part(
        {  # all there are
            ("further", "chat", 0.0): 600e3,
            ("further", "chat", 1.0): 100e3,
            ("further", "synthesised", 0.0): 100e3,
            ("retold", "code", 0.0): 50e3,
            ("moresums", "math", 0.0): 600e3,
        },
        longest=600,
        usually_long=600,
    ),
    "among": Part(  # among the eighth, which has few functions; with --unseen of what went beside the two before
        {
            ("library", "code", 0.0): 60e3,
            ("function", "code", 0.0): 15e3,
            ("routine", "code", 0.0): 15e3,
            ("more", "code", 0.0): 20e3,
            ("boxed", "math", 0.0): 15e3,
            ("lengthy", "chat", 0.0): 20e3,
            ("subject", "chat", 0.0): 20e3,
        },
        longest=600,
        usually_long=600,
    ),
    "confidence": Part(
        {
            ("aside", "chat", 0.0): 200e3,
            ("problem", "math", 0.0): 50e3,
            ("library", "code", 0.0): 25e3,
            ("more", "code", 0.0): 10e3,
            ("unseen", "chat", 0.0): 200e3,
            ("unseen", "code", 0.0): 50e3,
            ("written", "chat", 0.0): 100e3,
            ("written", "code", 0.0): 50e3,
        },
        longest=600,
        usually_long=600,
    ),
}


def pick(part: Part, pools: dict[tuple[str, str, float], list[dict[str, Any]]], source: random.Random) -> list[Any]:
    picked: list[dict[str, Any]] = []
    for kind, most in part.tokens.items():
        taken = 0
        pool = pools.get(kind, [])
        source.shuffle(pool)
        for answer in pool:
            tokens = len(answer["prompt_ids"]) + len(answer["response_ids"])
            if tokens > part.long.get(kind[0], part.usually_long) and source.random() < 0.85:
                continue
            if tokens > part.longest or taken + tokens > most or len(answer["response_ids"]) < SHORTEST_ANSWER:
                continue
            taken += tokens
            picked += [answer] * (1 + (kind[0] in part.twice))
    source.shuffle(picked)
    return picked


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("output", type=Path)
    parser.add_argument("responses", type=Path, nargs="+")
    parser.add_argument("--unseen", type=Path, action="append", default=[], help="leave out what is picked there")
    arguments = parser.parse_args()
    seen = {tuple(answer["prompt_ids"]) for file in arguments.unseen for answer in read(file)}
    pools: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for file in arguments.responses:
        name = file.stem.removesuffix("responses").removesuffix("-") or "first"
        for answer in read(file):
            if tuple(answer["prompt_ids"]) not in seen:
                pools.setdefault((name, answer["domain"], answer["temperature"]), []).append(answer)
    picked = pick(PARTS[arguments.part], pools, random.Random(11))
    arguments.output.write_text("".join(json.dumps(answer) + "\n" for answer in picked), encoding="utf-8")


if __name__ == "__main__":
    main()
