"""Which answers a part of the training takes, from all that there are.

python pick.py second|third picked.jsonl responses.jsonl more-responses.jsonl …

A file is known by what stands before `-responses`, the one without by `first`. What the part before left weak weighs
most: in the second part functions to be completed and conversation, answered greedily; in the third conversations of
two turns. Long sequences are mostly left out of the second, because their features take the time of two short ones; the
third has them, because a drafter is no better at a depth than what it has seen of it.
"""

from __future__ import annotations

import json
import random
import sys
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


def main() -> None:
    part, output, *files = sys.argv[1:]
    pools: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for file in files:
        name = Path(file).stem.removesuffix("responses").removesuffix("-") or "first"
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            answer = json.loads(line)
            pools.setdefault((name, answer["domain"], answer["temperature"]), []).append(answer)
    picked = pick(PARTS[part], pools, random.Random(11))
    Path(output).write_text("".join(json.dumps(answer) + "\n" for answer in picked), encoding="utf-8")


if __name__ == "__main__":
    main()
