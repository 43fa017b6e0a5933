"""The recipe works: a drafter trained from scratch is at least as good as the one the reference code made.

The reference drafters were trained for some hundred steps with DeepSpec's own code. Here the commands' own functions
write responses to snippets of this project's documentation, train for 500 steps, export, and decode the recorded
prompts.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tokenizers

pytest.importorskip("torch", reason="training needs the [train] extra")

from dspark_edge.exporter.export import ExportOptions, export_bundle
from dspark_edge.runtime import Generator, SamplingParams
from dspark_edge.runtime.prompts import PromptRecord
from dspark_edge.runtime.tokenizer import Tokenizer
from dspark_edge.trainer.responses.plan import ResponseSettings, Script
from dspark_edge.trainer.responses.torch_responder import TorchResponder
from dspark_edge.trainer.responses.writer import write_responses
from dspark_edge.trainer.target_model import TargetModel
from dspark_edge.trainer.training.settings import DrafterSettings, TrainingSettings
from dspark_edge.trainer.training.train import Resources, train_drafter

pytestmark = pytest.mark.needs_export

END = 256


def snippets(count: int) -> list[PromptRecord]:
    """Pieces of our own words, as bytes: the reference targets are byte-level models of simple prose."""
    folder = Path(__file__).parents[2] / "docs"
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.md"))).lower()
    text = re.sub(r" +", " ", re.sub(r"[^a-z ,.]+", " ", text))
    random = np.random.default_rng(0)
    records = []
    for number in range(count):
        start = int(random.integers(0, len(text) - 24))
        piece = text[start : start + int(random.integers(3, 24))]
        records.append(PromptRecord(number + 1, "prose", token_ids=tuple(piece.encode())))
    return records


@pytest.mark.parametrize(("target", "drafter"), [("qwen3_target", "qwen3_vanilla"), ("llama_target", "llama_vanilla")])
def test_500_steps_reach_the_recorded_accepted_length(
    reference_dir: Path, tmp_path: Path, target: str, drafter: str
) -> None:
    recorded = json.loads((reference_dir / drafter / "reference.json").read_text())
    shape = json.loads((reference_dir / drafter / "config.json").read_text())
    responses = tmp_path / "responses.jsonl"
    settings = ResponseSettings(max_new_tokens=64, wave=64)
    responder = TorchResponder(TargetModel.load(reference_dir / target, 128), [END])
    no_words = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?")))
    script = Script(snippets(384), settings, no_words, None, None, target)
    write_responses(script, responder, responses)
    train_drafter(
        reference_dir / target,
        [responses],
        tmp_path / "drafter",
        DrafterSettings(
            layers=shape["num_hidden_layers"],
            block_size=shape["block_size"],
            taps=tuple(shape["target_layer_ids"]),
            markov_rank=shape["markov_rank"],
            mask_token_id=shape["mask_token_id"],
        ),
        TrainingSettings(
            steps=500, batch=8, anchors=shape["num_anchors"], learning_rate=2e-3, warmup=30, held_out=0.05
        ),
        Resources(device="cpu"),
    )
    export_bundle(reference_dir / target, tmp_path / "drafter", tmp_path / "bundle", ExportOptions(capacity=256))
    lengths: list[int] = []
    with Generator.open(tmp_path / "bundle", mode="static") as generator:
        for sample in recorded["samples"]:
            answer = generator.generate(sample["prompt"], SamplingParams(max_new_tokens=64, ignore_eos=True))
            assert list(answer.token_ids) == sample["output"][len(sample["prompt"]) :][:64]
            lengths += answer.statistics.accepted_lengths
    theirs = [length for sample in recorded["samples"] for length in sample["acceptance_lengths"]]
    assert sum(lengths) / len(lengths) >= sum(theirs) / len(theirs)
