"""More prompts from those there are, in the forms that people ask in.

python prompts.py PROMPTS.jsonl boxed.jsonl stubs.jsonl sums.jsonl moresums.jsonl

`boxed.jsonl`: problems of the domain `math`, asked for steps and a final answer in a box. `stubs.jsonl`: problems of
the domain `code` as a function's stub, whose docstring is the problem. `sums.jsonl` and `moresums.jsonl`: other
problems of `math`, as they are.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
MOST_BOXED = 640
MOST_SUMS = 1280
MOST_MORE_SUMS = 960
LONGEST_CODE = 1100  # characters
SIGNATURE = re.compile(r"def (\w+)\(([^)]*)\)( *-> *[\w\[\], .]+)?")


def stub(problem: str) -> str:
    """A problem in words as a function to be completed."""
    found = SIGNATURE.search(problem)
    signature = found.group(0).strip() if found else "def solution(data)"
    docstring = problem.strip().replace('"""', "'''").replace("\n", "\n    ")
    return (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f'```python\n\n{signature}:\n    """{docstring}\n    """\n```'
    )


def main() -> None:
    source, boxed, stubs, sums, more_sums = map(Path, sys.argv[1:])
    asked: dict[str, list[str]] = {"math": [], "code": []}
    for line in source.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        asked.setdefault(entry["domain"], []).append(entry["turns"][0])
    math = asked["math"]
    random.Random(7).shuffle(math)
    rest = math[MOST_BOXED:]
    # A data set's canary asks not to be trained on.
    short = [text for text in asked["code"] if len(text) <= LONGEST_CODE and "canary" not in text]
    for path, domain, texts in (
        (boxed, "math", [text + BOXED for text in math[:MOST_BOXED]]),
        (stubs, "code", [stub(text) for text in short]),
        (sums, "math", rest[:MOST_SUMS]),
        (more_sums, "math", rest[MOST_SUMS : MOST_SUMS + MOST_MORE_SUMS]),
    ):
        path.write_text("".join(json.dumps({"domain": domain, "turns": [text]}) + "\n" for text in texts), "utf-8")


if __name__ == "__main__":
    main()
