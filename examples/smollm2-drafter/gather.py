"""The prompts that are answered, and those that only the confidence head shall see, each once and in all their forms.

python gather.py PROMPTS.jsonl FOLDER EVALUATED.jsonl

FOLDER holds `*-prompts.jsonl` by the other scripts; this adds `train.jsonl` and `unseen.jsonl`. Problems of the domain
`math` are asked as they are, and for steps and a final answer in a box; problems of `code` also as a function's stub,
whose docstring is the problem. Functions that are named as one of EVALUATED, and what the calibration prompts ask, are
left out.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LONGEST_CODE = 1100  # characters
SIGNATURE = re.compile(r"def (\w+)\(([^)]*)\)( *-> *[\w\[\], .]+)?")
NAME = re.compile(r"def (\w+)\(")
SOURCES = ("function", "routine", "retold", "library", "conversation", "subject", "lengthy", "further", "package")
UNSEEN = 820  # prompts, their other forms aside
HERE = Path(__file__).parent


def stub(problem: str) -> str:
    """A problem in words as a function to be completed."""
    found = SIGNATURE.search(problem)
    signature = found.group(0).strip() if found else "def solution(data)"
    docstring = problem.strip().replace('"""', "'''").replace("\n", "\n    ")
    return (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f'```python\n\n{signature}:\n    """{docstring}\n    """\n```'
    )


def read(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Domain and turns of each line."""
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(entry["domain"], tuple(entry["turns"])) for entry in entries]


def essence(turn: str) -> str:
    """What is the same in both forms of a problem."""
    return turn.split(BOXED)[0].strip()


def main() -> None:
    source, folder, evaluated = map(Path, sys.argv[1:])
    # A data set's canary asks not to be trained on.
    given = [one for one in read(source) if "canary" not in one[1][0]]
    prompts = dict.fromkeys(given)
    prompts |= dict.fromkeys((domain, (turns[0] + BOXED,)) for domain, turns in given if domain == "math")
    short = [turns[0] for domain, turns in given if domain == "code" and len(turns[0]) <= LONGEST_CODE]
    prompts |= dict.fromkeys(("code", (stub(text),)) for text in short)
    for kind in SOURCES:
        prompts |= dict.fromkeys(read(folder / f"{kind}-prompts.jsonl"))
    taken = {name for _, turns in read(evaluated) for turn in turns for name in NAME.findall(turn)}
    aside = {essence(turn) for _, turns in read(HERE / "calibration-prompts.jsonl") for turn in turns}
    kept = [
        (domain, turns)
        for domain, turns in prompts
        if not aside & set(map(essence, turns)) and not (domain == "code" and taken & set(NAME.findall(turns[0])))
    ]
    random.Random(9).shuffle(kept)
    chosen = {essence(turns[0]) for _, turns in kept[:UNSEEN]}
    for name, unseen in (("train", False), ("unseen", True)):
        lines = [
            json.dumps({"domain": domain, "turns": turns}) + "\n"
            for domain, turns in kept
            if (essence(turns[0]) in chosen) == unseen
        ]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
