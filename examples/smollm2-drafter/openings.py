"""How users begin, for the target to go on: thousands of prompts that nobody wrote.

python openings.py openings.jsonl

`dspark-edge respond --synthesise N --openings openings.jsonl` lets the target end each of these, and answers what comes
out. Left to itself the target asks what it was trained on most, and hardly ever for a function in HumanEval's form; so
half of these begin such a one, by verb and noun, a fifth a problem with numbers, and the rest any request.
"""

from __future__ import annotations

import json
import random
import sys
from itertools import product
from pathlib import Path

TASK = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n\n"
TYPED = "from typing import List\n\n\n"
WORDS = json.loads((Path(__file__).parent / "openings.json").read_text(encoding="utf-8"))
"""Parts of openings; `taken` are names of HumanEval's own functions, which are left out."""


def main() -> None:
    random_order = random.Random(5)
    functions = [
        name
        for verb, noun in product(WORDS["verbs"], WORDS["nouns"])
        if (name := f"{verb}_{noun}") not in WORDS["taken"]
    ]
    random_order.shuffle(functions)
    lines = []
    for number, name in enumerate(functions):
        parameters = random_order.choice(WORDS["parameters"])
        head = f"{TYPED if 'List' in parameters else ''}def {name}({parameters}):"
        lines.append(("code", f'{TASK}{head}\n    """{random_order.choice(WORDS["docstrings"])}'))
        if number % 5 < 2:
            lines.append(("math", WORDS["sums"][(number // 5 * 2 + number % 5) % len(WORDS["sums"])]))
        if number % 5 < 3:
            request = (
                "" if number % 10 < 3 else WORDS["requests"][(number // 5 * 3 + number % 5) % len(WORDS["requests"])]
            )
            lines.append(("chat", request))
    text = "".join(json.dumps({"domain": domain, "turns": [words]}) + "\n" for domain, words in lines)
    Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
