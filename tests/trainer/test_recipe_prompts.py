"""The shipped drafter's prompts: what trains it, what judges it, and what is left for calibration."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parents[2] / "examples" / "smollm2-drafter"


def run(script: str, *arguments: Path) -> None:
    subprocess.run([sys.executable, str(RECIPE / script), *map(str, arguments)], check=True)


def turns_of(path: Path) -> list[tuple[str, ...]]:
    return [tuple(json.loads(line)["turns"]) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_trained_on_is_not_what_confidences_are_judged_by(tmp_path: Path) -> None:
    calibrated = [turns[0] for turns in turns_of(RECIPE / "calibration-prompts.jsonl")]
    given = [f"How much is {number} and {number}?" for number in range(2000)]
    problem = "Write a function def halve(x) that halves."
    lines = [{"domain": "math", "turns": [text]} for text in (*given, given[0], calibrated[0])]
    lines += [{"domain": "code", "turns": [text]} for text in (problem, "BENCHMARK canary GUID")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    evaluated = tmp_path / "evaluated.jsonl"
    evaluated.write_text('{"domain": "code", "turns": ["def taken(a):"]}\n', encoding="utf-8")
    for kind in ("library", "package"):
        stubs = [{"domain": "code", "turns": [text]} for text in (f"def taken(b): {kind}", f"def {kind}()")]
        text = "".join(json.dumps(stub) + "\n" for stub in stubs)
        (tmp_path / f"{kind}-prompts.jsonl").write_text(text, encoding="utf-8")
    names = [tmp_path / f"{kind}-prompts.jsonl" for kind in ("conversation", "function", "subject", "aside")]
    run("conversations.py", *names[:2])
    run("more_conversations.py", *names[2:])
    run("longer_conversations.py", *(tmp_path / f"{kind}-prompts.jsonl" for kind in ("lengthy", "rest", "further")))
    run("more_functions.py", *(tmp_path / f"{kind}-prompts.jsonl" for kind in ("routine", "others", "retold")))
    run("gather.py", tmp_path / "prompts.jsonl", tmp_path, evaluated)
    train, unseen = turns_of(tmp_path / "train.jsonl"), turns_of(tmp_path / "unseen.jsonl")
    assert len({*train, *unseen}) == len(train) + len(unseen) > 5000
    first = [{turns[0].split("\nPlease reason")[0] for turns in part} for part in (train, unseen)]
    assert 700 < len(first[1]) <= 820 and not first[0] & first[1]  # some of these 820 are one problem in two forms
    everything = first[0] | first[1]
    assert not everything & {*calibrated} and {*given} < everything and "def library()" in everything
    assert problem in everything and any("def halve(x):" in text and problem in text for text in everything)
    assert not any("taken" in text or "canary" in text for text in everything)


def test_openings_are_of_three_kinds(tmp_path: Path) -> None:
    run("openings.py", tmp_path / "openings.jsonl")
    entries = [json.loads(line) for line in (tmp_path / "openings.jsonl").read_text(encoding="utf-8").splitlines()]
    counts = {domain: sum(entry["domain"] == domain for entry in entries) for domain in ("code", "math", "chat")}
    assert sum(counts.values()) == len(entries) and counts["code"] > counts["chat"] > counts["math"] > 10_000
    assert len({entry["turns"][0] for entry in entries if entry["domain"] == "code"}) == counts["code"]
