"""The start that looks at the latest context."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="training needs the [train] extra")

import torch

from dspark_edge.exporter.weights import rotary_tables
from dspark_edge.trainer.target_model import TargetModel, rotate
from dspark_edge.trainer.training.drafter_model import TrainableDrafter
from dspark_edge.trainer.training.initialization import initialize
from dspark_edge.trainer.training.look_back import constant_direction, recency_vectors
from dspark_edge.trainer.training.settings import DrafterSettings

pytestmark = pytest.mark.needs_export


def test_a_constant_is_found_among_what_varies() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(500, 6, generator=generator)
    states[:, 2] = 2.0
    direction = constant_direction(states)
    assert (states @ direction - 1.0).abs().max() < 0.2
    silent = torch.randn(100, 6, generator=generator)
    silent[:, 2] = 2.0
    silent[:, 4] = 3.0  # tells them apart
    states[:, 4] = -3.0
    direction = constant_direction(states, silent)
    assert (states @ direction).mean() > 0.8
    assert (silent @ direction).mean().abs() < 0.2


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_the_rotated_product_peaks_at_the_distance(distance: int) -> None:
    frequencies = 10_000.0 ** (-torch.arange(16) / 16)
    query, key = recency_vectors(frequencies, (0.0, 0.4), distance)
    assert query.square().mean().item() == pytest.approx(1.0, abs=1e-5)
    assert key.square().mean().item() == pytest.approx(1.0, abs=1e-5)
    angles = torch.arange(40)[:, None] * frequencies
    cos, sin = angles.cos()[None, None], angles.sin()[None, None]
    queries = rotate(query.expand(1, 1, 40, -1), cos, sin)[0, 0]
    keys = rotate(key.expand(1, 1, 40, -1), cos, sin)[0, 0]
    products = queries[30] @ keys.T
    assert int(products.argmax()) == 30 - distance


@torch.no_grad()
def test_attention_starts_at_the_token_before_the_anchor(reference_dir: Path) -> None:
    """The first group's first head looks at the last positions before the anchor."""
    target = TargetModel.load(reference_dir / "qwen3_target", 64)
    drafter = TrainableDrafter(DrafterSettings(layers=1).shape(target.config, 257), 64)
    token_ids = torch.randint(0, 256, (1, 48), generator=torch.Generator().manual_seed(0))
    features, _ = target.features(token_ids, drafter.config.tap_layers)
    initialize(drafter, target, "recent", 0, features[0, 1:])
    attention = drafter.layers[0].self_attn
    context = drafter.hidden_norm(drafter.fc(features[0] * drafter.feature_scale))
    size = attention.head_dim
    cos, sin = rotary_tables(drafter.config.backbone, 64)
    anchor = drafter.layers[0].input_layernorm(target.embedding[token_ids[0, 40:41]])
    query = attention.q_norm(attention.q_proj(anchor).view(1, -1, size))[:, :1].transpose(0, 1)[None]
    keys = attention.k_norm(attention.k_proj(context[:40]).view(40, -1, size))[:, :1].transpose(0, 1)[None]
    rotated = rotate(query, cos[40:41][None, None], sin[40:41][None, None])
    scores = (rotated @ rotate(keys, cos[:40][None, None], sin[:40][None, None]).transpose(2, 3))[0, 0, 0] / size**0.5
    share = torch.softmax(scores, dim=0)
    # These embeddings of bytes share no mean, as those of a language model do; and yet.
    assert int(share.argmax()) >= 38
    assert share[-2:].sum() > 4 * 2 / 40


def test_it_needs_a_sample(reference_dir: Path) -> None:
    from dspark_edge.engines.errors import InvalidInputError

    target = TargetModel.load(reference_dir / "qwen3_target", 64)
    drafter = TrainableDrafter(DrafterSettings(layers=1).shape(target.config, 257), 64)
    with pytest.raises(InvalidInputError, match="sample of features"):
        initialize(drafter, target, "recent", 0)
