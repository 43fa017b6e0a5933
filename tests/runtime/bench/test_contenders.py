"""What a contender counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.runtime import SamplingParams
from dspark_edge.runtime.bench.contenders import ModelContender
from dspark_edge.runtime.bench.settings import Mode

PROMPTS = [[*b"the cat"], [*b"and on and on"], [*b"so"], [*b"the log"]]
LENGTHS = (3, 24, 5, 7)


@pytest.mark.parametrize("mode", [Mode("plain"), Mode("static")], ids=["plain", "static"])
def test_groups_are_full_until_the_last_answer(bundle_dir: Path, mode: Mode) -> None:
    params = [SamplingParams(max_new_tokens=length, ignore_eos=True) for length in LENGTHS]
    with OnnxRuntimeEngine(Bundle.open(bundle_dir), threads=1) as engine:
        with ModelContender(engine, mode, 1, None) as contender:
            alone = contender.run(PROMPTS, params)
        with ModelContender(engine, mode, 2, None) as contender:
            together = contender.run(PROMPTS, params)
            again = contender.run(PROMPTS, params)  # nothing of the first run is left
    assert together.answers == again.answers == alone.answers
    assert [len(answer) for answer in together.answers] == [*LENGTHS]
    assert alone.tokens == sum(LENGTHS) - len(LENGTHS) and alone.rounds == alone.steps
    # The request of 24 tokens outlives the others: beside it prompts are asked again, and what they give counts.
    for run in (together, again):
        assert run.tokens > alone.tokens
        assert run.rounds >= 2 * run.steps - 2  # but for the first steps, while the second prompt is read
