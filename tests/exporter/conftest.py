"""Tiny random checkpoints: a target in the Hugging Face layout, a drafter in DeepSpec's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Checkpoint = Callable[..., Path]

SIZES: Mapping[str, Any] = {
    "vocab_size": 260,  # as the reference pairs', so that sampler graphs are traced once
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
}


class Weights(dict[str, torch.Tensor]):
    """Random tensors by name."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def matrix(self, name: str, *shape: int, scale: float | None = None) -> None:
        deviation = shape[-1] ** -0.5 if scale is None else scale
        self[name] = torch.randn(*shape, generator=self.generator) * deviation

    def norm(self, name: str, size: int) -> None:
        self[name] = 1 + 0.2 * torch.randn(size, generator=self.generator)

    def projection(self, name: str, outputs: int, inputs: int, bias: bool = False) -> None:
        self.matrix(f"{name}.weight", outputs, inputs)
        if bias:
            self.matrix(f"{name}.bias", outputs, scale=0.3)

    def layer(self, prefix: str, config: Mapping[str, Any], qk_norm: bool) -> None:
        hidden, size, bias = config["hidden_size"], config["head_dim"], config["attention_bias"]
        queries, keys = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
        self.norm(f"{prefix}.input_layernorm.weight", hidden)
        self.norm(f"{prefix}.post_attention_layernorm.weight", hidden)
        for name, outputs in (("q", queries), ("k", keys), ("v", keys)):
            self.projection(f"{prefix}.self_attn.{name}_proj", outputs, hidden, bias)
        self.projection(f"{prefix}.self_attn.o_proj", hidden, queries, bias)
        if qk_norm:
            self.norm(f"{prefix}.self_attn.q_norm.weight", size)
            self.norm(f"{prefix}.self_attn.k_norm.weight", size)
        for name in ("gate", "up"):
            self.projection(f"{prefix}.mlp.{name}_proj", config["intermediate_size"], hidden)
        self.projection(f"{prefix}.mlp.down_proj", hidden, config["intermediate_size"])


def write(folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    save_file(dict(weights), folder / "model.safetensors")
    return folder


def write_target(folder: Path, architecture: str = "Qwen3ForCausalLM", seed: int = 0, **changes: Any) -> Path:
    config = {**SIZES, "architectures": [architecture], **changes}
    weights = Weights(seed)
    weights.matrix("model.embed_tokens.weight", config["vocab_size"], config["hidden_size"], scale=0.5)
    for index in range(config["num_hidden_layers"]):
        weights.layer(f"model.layers.{index}", config, architecture.startswith("Qwen3"))
    weights.norm("model.norm.weight", config["hidden_size"])
    if not config["tie_word_embeddings"]:
        weights.matrix("lm_head.weight", config["vocab_size"], config["hidden_size"])
    return write(folder, config, weights)


def write_drafter(folder: Path, target: Path, seed: int = 1, **changes: Any) -> Path:
    own = json.loads((target / "config.json").read_text())
    config = {
        **own,
        "architectures": ["Qwen3DSparkModel"],
        "num_target_layers": own["num_hidden_layers"],
        "num_hidden_layers": 2,
        "block_size": 5,
        "mask_token_id": 257,
        "target_layer_ids": [0, 2],
        "markov_rank": 8,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "tie_word_embeddings": False,
        **changes,
    }
    weights = Weights(seed)
    hidden, vocabulary, rank = config["hidden_size"], config["vocab_size"], config["markov_rank"]
    drafted = config.get("draft_vocab_size") or vocabulary
    weights.projection("fc", hidden, len(config["target_layer_ids"]) * hidden)
    weights.norm("hidden_norm.weight", hidden)
    for index in range(config["num_hidden_layers"]):
        weights.layer(f"layers.{index}", config, True)
    weights.norm("norm.weight", hidden)
    if rank:
        weights.matrix("markov_head.markov_w1.weight", vocabulary, rank, scale=1.0)
        weights.matrix("markov_head.markov_w2.weight", drafted, rank, scale=1.0)
        if config["markov_head_type"] == "gated":
            weights.projection("markov_head.gate_proj", rank, hidden + rank, True)
        elif config["markov_head_type"] == "rnn":
            weights.projection("markov_head.joint_proj", 3 * rank, 2 * rank + hidden, True)
    if config["enable_confidence_head"]:
        inputs = hidden + (rank if config["confidence_head_with_markov"] else 0)
        inputs += 3 if config.get("confidence_head_with_draft_probs") else 0
        weights.projection("confidence_head.proj", 1, inputs, True)
    if drafted < vocabulary:
        ids = torch.randperm(vocabulary, generator=weights.generator)[:drafted]
        weights["draft_vocab_ids"] = ids.sort().values
    shared = load_file(target / "model.safetensors")
    embedding = shared["model.embed_tokens.weight"]
    weights["embed_tokens.weight"] = embedding
    weights["lm_head.weight"] = shared.get("lm_head.weight", embedding).clone()
    return write(folder, config, weights)


@pytest.fixture(scope="session")
def make_target() -> Checkpoint:
    """`make_target(folder, architecture, seed, **config)`: write a random target."""
    return write_target


@pytest.fixture(scope="session")
def make_drafter() -> Checkpoint:
    """`make_drafter(folder, target, seed, **config)`: write a random drafter for a target."""
    return write_drafter
