"""Every reference pair in every lowering: the tokens and accepted lengths that DeepSpec's own evaluation recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dspark_edge.runtime import Generator, SamplingParams

pytestmark = pytest.mark.needs_export

PAIRS = (
    ("qwen3_target", "qwen3_vanilla"),
    ("qwen3_target", "qwen3_rnn"),
    ("qwen3_target", "qwen3_dflash"),
    ("llama_target", "llama_vanilla"),
)


@pytest.mark.parametrize("lowering", ["ort", "onnx", "decomposed"])
@pytest.mark.parametrize(("target", "drafter"), PAIRS)
def test_the_recorded_rounds_come_out(
    reference_bundle: Callable[..., Path], reference_dir: Path, target: str, drafter: str, lowering: str
) -> None:
    record = json.loads((reference_dir / drafter / "reference.json").read_text())
    # Where a round ended exactly at the limit, the recording went on for one more; a limit one higher goes there, too.
    params = SamplingParams(max_new_tokens=record["max_new_tokens"] + 1, ignore_eos=True)
    with Generator.open(reference_bundle(target, drafter, lowering), threads=1) as generator:
        for sample in record["samples"]:
            answer = generator.generate(sample["prompt"], params)
            assert [*sample["prompt"], *answer.token_ids[:-1]] == sample["output"]
            assert list(answer.statistics.accepted_lengths) == sample["acceptance_lengths"]
