"""benchmarks/draft_lengths.py: rounds over answers that are there, as decoding with fixed blocks would go."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch", reason="drafters in torch need the [train] extra")

import draft_lengths


def test_a_round_commits_what_is_accepted_and_one_more() -> None:
    # Anchors 0, 3 (two accepted and the target's own), 4, 7; the last round is cut by the answer's end.
    assert draft_lengths.walk(np.array([2, 9, 9, 0, 2, 9, 9, 5])) == ([2, 0, 2, 5], 8)
    assert draft_lengths.walk(np.array([], dtype=int)) == ([], 0)


@pytest.mark.needs_export
def test_both_turns_of_a_conversation_count(reference_dir, tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    import json

    first, second = [97, 98, 99], [100, 101, 102, 103]
    lines = [
        {"plan": "p", "prompt": 0, "turn": 0, "temperature": 0, "prompt_ids": [1, 2], "response_ids": first},
        {
            "plan": "p",
            "prompt": 0,
            "turn": 1,
            "temperature": 0,
            "prompt_ids": [1, 2, *first, 3],
            "response_ids": second,
        },
    ]
    responses, report = tmp_path / "responses.jsonl", tmp_path / "report.json"
    responses.write_text("".join(json.dumps({"domain": "chat", **line}) + "\n" for line in lines), encoding="utf-8")
    drafter, target = reference_dir / "qwen3_vanilla", str(reference_dir / "qwen3_target")
    assert draft_lengths.main([str(responses), str(drafter), "--target", target, "--json", str(report)]) == 0
    (found,) = json.loads(report.read_text())
    # Two and three anchors: a random drafter is right by chance alone, so nearly every one is a round.
    assert 1.0 <= found["domains"]["chat"]["accepted_length"] <= 5.0
    assert found["drafter"] == "qwen3_vanilla" and "chat" in capsys.readouterr().out
