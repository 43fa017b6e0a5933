"""The drafter that is trained is the drafter that is exported: against the records of the public reference code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="training needs the [train] extra")

import torch
from safetensors.torch import load_file

from dspark_edge.exporter.checkpoint import open_checkpoint
from dspark_edge.exporter.configuration import read_drafter_config
from dspark_edge.trainer.target_model import TargetModel
from dspark_edge.trainer.training.drafter_model import TrainableDrafter, block_mask

pytestmark = pytest.mark.needs_export

PAIRS = [
    ("qwen3_target", "qwen3_vanilla"),
    ("qwen3_target", "qwen3_rnn"),
    ("qwen3_target", "qwen3_dflash"),
    ("llama_target", "llama_vanilla"),
]


def load_drafter(folder: Path, positions: int = 256) -> TrainableDrafter:
    """A reference drafter in the module that is trained."""
    with open_checkpoint(folder) as checkpoint:
        config = read_drafter_config(checkpoint.config, str(folder))
    drafter = TrainableDrafter(config, positions)
    tensors = load_file(folder / "model.safetensors")
    for name in ("embed_tokens.weight", "lm_head.weight"):
        tensors.pop(name, None)
    drafter.load_state_dict(tensors)  # strict: the names are DeepSpec's
    return drafter.eval()


def embeddings(target: TargetModel, anchor_ids: Any, mask_token_id: int) -> Any:
    both = torch.stack((anchor_ids, torch.full_like(anchor_ids, mask_token_id)), dim=-1)
    return torch.nn.functional.embedding(both, target.embedding)


@pytest.mark.parametrize(("target_name", "drafter_name"), PAIRS)
@torch.no_grad()
def test_blocks_of_a_sequence_are_what_the_reference_recorded(
    reference_dir: Path, target_name: str, drafter_name: str
) -> None:
    """All recorded rounds of a sample at once: packed blocks must not see each other, nor what is behind them."""
    folder = reference_dir / drafter_name
    target = TargetModel.load(reference_dir / target_name, 256)
    drafter = load_drafter(folder)
    record = json.loads((folder / "reference.json").read_text())
    stored = load_file(folder / "reference.safetensors")
    compared = 0
    for number, sample in enumerate(record["samples"]):
        rounds = [
            (index, one) for index, one in enumerate(sample["rounds"]) if f"p{number}.r{index}.block_hidden" in stored
        ]
        if not rounds:
            continue
        token_ids = torch.tensor([sample["output"]])
        features, _ = target.features(token_ids, drafter.config.tap_layers)
        anchors = torch.tensor([[one["start"] for _, one in rounds]])
        drafts = torch.tensor([[one["verify_ids"] for _, one in rounds]])  # [1, A, γ+1]
        previous = drafts[..., :-1]
        given = embeddings(target, previous[..., 0], drafter.config.mask_token_id)
        blocks = drafter(features, given, anchors, previous)
        logits = target.logits(blocks.hidden)
        for at, (index, _) in enumerate(rounds):
            key = f"p{number}.r{index}"
            torch.testing.assert_close(blocks.hidden[0, at], stored[f"{key}.block_hidden"], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(logits[0, at], stored[f"{key}.base_logits"], atol=1e-4, rtol=1e-4)
            if blocks.confidence_logits is not None:
                torch.testing.assert_close(
                    blocks.confidence_logits[0, at], stored[f"{key}.confidence_logits"].flatten(), atol=1e-4, rtol=1e-4
                )
            total = logits[0, at]
            if blocks.markov is not None and drafter.markov_head is not None:
                total = total + blocks.markov[0, at] @ drafter.markov_head.markov_w2.weight.T
            # Greedy drafting with the drafts as they were: every step's argmax is the recorded draft.
            assert total.argmax(dim=-1).tolist() == drafts[0, at, 1:].tolist()
            compared += 1
    assert compared >= 6


def test_a_row_sees_the_context_before_its_anchor_and_its_own_block() -> None:
    mask = block_mask(torch.tensor([[1, 3]]), length=4, block=2)[0, 0]
    expected = [
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 0, 0, 0, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 1, 1],
        [1, 1, 1, 0, 0, 0, 1, 1],
    ]
    assert np.array_equal(mask.int().numpy(), expected)


@torch.no_grad()
def test_the_scale_of_the_features_is_part_of_the_checkpoint(reference_dir: Path) -> None:
    drafter = load_drafter(reference_dir / "qwen3_vanilla")
    plain = load_drafter(reference_dir / "qwen3_vanilla")
    generator = torch.Generator().manual_seed(0)
    drafter.feature_scale.copy_(torch.rand(drafter.feature_scale.shape, generator=generator) + 0.5)
    plain.load_state_dict(drafter.checkpoint_tensors())
    features = torch.randn(1, 9, len(drafter.feature_scale), generator=generator)
    given = torch.randn(1, 2, 2, drafter.config.backbone.hidden_size, generator=generator)
    anchors, previous = torch.tensor([[3, 7]]), torch.zeros(1, 2, 7, dtype=torch.int64)
    scaled = drafter(features, given, anchors, previous).hidden
    torch.testing.assert_close(plain(features, given, anchors, previous).hidden, scaled, atol=1e-5, rtol=1e-4)
