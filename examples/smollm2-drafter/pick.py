"""Which answers the second part of the training takes, from all that there are.

python pick.py picked.jsonl FIRST.jsonl MORE.jsonl LIBRARY.jsonl BOXED.jsonl

What the first part left weak weighs most: functions to be completed and conversation, answered greedily. Long
sequences are mostly left out, because their features take the time of two short ones.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

# (file, domain, temperature) → most tokens, prompts included.
TOKENS = {
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
}
LONG = {"library": 330, "boxed": 400}  # tokens from which one in seven stays
USUALLY_LONG = 270
LONGEST, SHORTEST_ANSWER = 400, 24


def main() -> None:
    output, *files = map(Path, sys.argv[1:])
    source = random.Random(11)
    pools: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for name, file in zip(("first", "more", "library", "boxed"), files, strict=True):
        for line in file.read_text(encoding="utf-8").splitlines():
            answer = json.loads(line)
            pools.setdefault((name, answer["domain"], answer["temperature"]), []).append(answer)
    picked: list[dict[str, Any]] = []
    for kind, most in TOKENS.items():
        taken = 0
        pool = pools.get(kind, [])
        source.shuffle(pool)
        for answer in pool:
            tokens = len(answer["prompt_ids"]) + len(answer["response_ids"])
            if tokens > LONG.get(kind[0], USUALLY_LONG) and source.random() < 0.85:
                continue
            if tokens > LONGEST or taken + tokens > most or len(answer["response_ids"]) < SHORTEST_ANSWER:
                continue
            taken += tokens
            picked.append(answer)
    source.shuffle(picked)
    output.write_text("".join(json.dumps(answer) + "\n" for answer in picked), encoding="utf-8")


if __name__ == "__main__":
    main()
