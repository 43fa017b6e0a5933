"""The tracing modules against transformers, and against the reference's formulas written out plainly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from dspark_edge.exporter.configuration import DecoderConfig, DrafterConfig
from dspark_edge.exporter.modules.target import Target
from dspark_edge.exporter.pair import Pair, open_pair
from dspark_edge.exporter.weights import load_module

Checkpoint = Callable[..., Path]
Weights = dict[str, torch.Tensor]
TOLERANCE = 1e-4
CAPACITY = 48
CHUNKS = (13, 1, 4, 1, 9)

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # so that all three bands of the scaling are met
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"num_key_value_heads": 4}),
    "llama-tied-gqa": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": ("Llama", {"rope_parameters": LINEAR_ROPE}),
    "qwen3-tied": (
        "Qwen3",
        {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    ),
    "qwen3-untied-mqa": ("Qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
    "qwen3-linear-rope": ("Qwen3", {"rope_parameters": LINEAR_ROPE}),
}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def oracle(name: str) -> nn.Module:
    """A random model of transformers', with norms and biases that matter."""
    import transformers

    family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.3)
            elif "norm" in key:
                parameter.normal_(1, 0.2)
            elif parameter.dim() == 2:
                parameter.normal_(0, 0.5 if "embed" in key else parameter.shape[1] ** -0.5)
    return model


def load_target(pair: Pair) -> Target:
    with torch.device("meta"):
        module = pair.build_target(CAPACITY, torch.float32)
    load_module(module, pair.target_sources(CAPACITY))
    return module


def empty_caches(config: DecoderConfig) -> list[torch.Tensor]:
    # Not zeros: what lies beyond the valid length must not matter.
    shape = (1, config.num_key_value_heads, CAPACITY, config.head_dim)
    return [torch.full(shape, 7.0) for _ in range(2 * config.num_layers)]


@torch.no_grad()
def run_target(target: Target, config: DecoderConfig, ids: torch.Tensor, chunks: Sequence[int]) -> torch.Tensor:
    past, logits, begin = empty_caches(config), [], 0
    for width in chunks:
        part = ids[:, begin : begin + width]
        rows = torch.arange(width)[None]
        given, past, _ = target(part, torch.tensor([begin]), rows, past, [])
        logits.append(given)
        begin += width
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("name", MODELS)
def test_target_equals_transformers(name: str, tmp_path: Path, stack: ExitStack) -> None:
    model = oracle(name)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    pair = open_pair(stack, tmp_path, "ngram")
    target = load_target(pair)
    ids = torch.randint(0, SIZES["vocab_size"], (1, sum(CHUNKS)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids).logits
    whole = run_target(target, pair.target_config, ids, [ids.shape[1]])
    assert torch.allclose(whole, expected, atol=TOLERANCE, rtol=0)
    assert torch.allclose(run_target(target, pair.target_config, ids, CHUNKS), expected, atol=TOLERANCE, rtol=0)


def test_only_the_rows_asked_for_get_logits(tmp_path: Path, make_target: Checkpoint, stack: ExitStack) -> None:
    pair = open_pair(stack, make_target(tmp_path / "target"), "ngram")
    target, config = load_target(pair), pair.target_config
    ids = torch.randint(0, 260, (2, 6), generator=torch.Generator().manual_seed(0))
    past = [torch.cat([cache, cache]) for cache in empty_caches(config)]
    lengths = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        every, _, _ = target(ids, lengths, torch.arange(6).expand(2, 6), past, [])
        some, _, _ = target(ids, lengths, torch.tensor([[5, 0], [2, 2]]), past, [])
    assert torch.allclose(some[0], every[0, [5, 0]], atol=1e-5)
    assert torch.allclose(some[1], every[1, [2, 2]], atol=1e-5)


@pytest.mark.parametrize("name", ["llama-biases", "qwen3-tied"])
def test_taps_are_hidden_states(name: str, tmp_path: Path, stack: ExitStack) -> None:
    model = oracle(name)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    pair = open_pair(stack, tmp_path, "ngram")
    taps = (2, -1, 0, 1)  # in the drafter's order, not the layers'
    drafter = DrafterConfig(replace(pair.target_config, num_layers=1), 4, 5, 0, taps, 0, "none", False, False)
    target = Target(pair.target_config, drafter, CAPACITY, torch.float32)
    sources = pair.target_sources(CAPACITY)
    with torch.no_grad():
        for key, parameter in target.named_parameters():
            parameter.copy_(sources[key].load(torch.float32)) if key in sources else parameter.fill_(1.0)
    seen: list[torch.Tensor] = []
    assert target.context is not None
    target.context.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    ids = torch.randint(0, SIZES["vocab_size"], (1, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        caches = empty_caches(pair.target_config)
        context = empty_caches(drafter.backbone)
        target(ids, torch.tensor([0]), torch.tensor([[10]]), caches, context)
        hidden = model(ids, output_hidden_states=True).hidden_states
    expected = torch.cat([hidden[tap + 1] for tap in taps], dim=-1)
    assert torch.allclose(seen[0], expected, atol=TOLERANCE, rtol=0)


# The drafter, as /docs and the reference describe it: no cache, no fused projections, one position at a time.


def plain_norm(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return states / (states.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight


def plain_rope(states: torch.Tensor, first: int, theta: float) -> torch.Tensor:
    """states [n, heads, D], rotated as positions first …"""
    count, _, size = states.shape
    angles = torch.arange(first, first + count)[:, None] / theta ** (torch.arange(0, size, 2) / size)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    turned = torch.cat([-states[..., size // 2 :], states[..., : size // 2]], dim=-1)
    return states * angles.cos() + turned * angles.sin()


def plain_block(
    weights: Weights, config: DrafterConfig, features: torch.Tensor, anchor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """features [start, T·d] → the block's hidden rows [γ, d] and base logits [γ, V], -inf for what is never drafted."""
    backbone = config.backbone
    epsilon, theta, size = backbone.rms_norm_eps, backbone.rotary.theta, backbone.head_dim
    start = features.shape[0]

    def project(prefix: str, states: torch.Tensor) -> torch.Tensor:
        return functional.linear(states, weights[f"{prefix}.weight"], weights.get(f"{prefix}.bias"))

    def heads(prefix: str, part: str, states: torch.Tensor, first: int) -> torch.Tensor:
        split = project(f"{prefix}.{part}_proj", states).unflatten(-1, (-1, size))
        if part == "v":
            return split
        return plain_rope(plain_norm(split, weights[f"{prefix}.{part}_norm.weight"], epsilon), first, theta)

    context = plain_norm(project("fc", features), weights["hidden_norm.weight"], epsilon)
    ids = torch.tensor([anchor, *[config.mask_token_id] * (config.block_size - 1)])
    states = weights["embed_tokens.weight"][ids]
    for index in range(backbone.num_layers):
        layer, attention = f"layers.{index}", f"layers.{index}.self_attn"
        normed = plain_norm(states, weights[f"{layer}.input_layernorm.weight"], epsilon)
        query = heads(attention, "q", normed, start)
        key, value = (
            torch.cat([heads(attention, part, context, 0), heads(attention, part, normed, start)]) for part in "kv"
        )
        mixed = []
        for head in range(query.shape[1]):
            shared = head * key.shape[1] // query.shape[1]
            scores = query[:, head] @ key[:, shared].t() / size**0.5
            mixed.append(torch.softmax(scores, dim=-1) @ value[:, shared])
        states = states + project(f"{attention}.o_proj", torch.cat(mixed, dim=-1))
        normed = plain_norm(states, weights[f"{layer}.post_attention_layernorm.weight"], epsilon)
        gate, up = project(f"{layer}.mlp.gate_proj", normed), project(f"{layer}.mlp.up_proj", normed)
        states = states + project(f"{layer}.mlp.down_proj", functional.silu(gate) * up)
    hidden = plain_norm(states, weights["norm.weight"], epsilon)
    return hidden, plain_drafted(weights, hidden @ weights["lm_head.weight"].t())


def plain_drafted(weights: Weights, logits: torch.Tensor) -> torch.Tensor:
    """Logits [γ, V] in which only the tokens of the draft vocabulary, where there is one, can be drafted."""
    if "draft_vocab_ids" not in weights:
        return logits
    drafted = torch.zeros(logits.shape[-1], dtype=torch.bool)
    drafted[weights["draft_vocab_ids"]] = True
    return torch.where(drafted, logits, -torch.inf)


def plain_walk(
    weights: Weights, config: DrafterConfig, hidden: torch.Tensor, base: torch.Tensor, anchor: int
) -> tuple[list[int], list[float], torch.Tensor]:
    """Greedy: draft ids, confidence logits, and the probabilities of the whole vocabulary [γ, V]."""
    rank, previous = config.markov_rank, anchor
    state = torch.zeros(rank)
    ids, confidences, probs = [], [], []
    for h, logits in zip(hidden, base, strict=True):
        edge = torch.zeros(0)
        if rank:
            edge = weights["markov_head.markov_w1.weight"][previous]
            mixed = edge
            if config.markov_head == "gated":
                gate = functional.linear(
                    torch.cat([h, edge]),
                    weights["markov_head.gate_proj.weight"],
                    weights["markov_head.gate_proj.bias"],
                )
                mixed = torch.sigmoid(gate) * edge
            elif config.markov_head == "rnn":
                joint = weights["markov_head.joint_proj.weight"] @ torch.cat([state, edge, h])
                g, c, o = (joint + weights["markov_head.joint_proj.bias"]).reshape(3, rank)
                state = torch.sigmoid(g) * state + (1 - torch.sigmoid(g)) * torch.tanh(c)
                mixed = torch.tanh(o)
            bias = weights["markov_head.markov_w2.weight"] @ mixed
            logits = logits.clone()
            logits[weights.get("draft_vocab_ids", torch.arange(len(logits)))] += bias
        if config.confidence:
            feature = torch.cat([h, edge]) if config.confidence_with_markov else h
            if config.confidence_with_draft_probs:
                best = logits.sort(descending=True).values[:16]
                peak = torch.softmax(best[best.isfinite()], dim=0)[0]
                feature = torch.cat([feature, torch.stack([peak.log(), best[0] - best[1], peak])])
            proj = weights["confidence_head.proj.weight"][0] @ feature + weights["confidence_head.proj.bias"]
            confidences.append(float(proj))
        previous = int(logits.argmax())
        ids.append(previous)
        probs.append(torch.softmax(logits, dim=-1))
    return ids, confidences, torch.stack(probs)


DRAFTERS: dict[str, dict[str, Any]] = {
    "vanilla": {"target_layer_ids": [2, 0]},
    "gated": {"markov_head_type": "gated", "target_layer_ids": [-1, 1], "confidence_head_with_markov": False},
    "rnn": {"markov_head_type": "rnn", "block_size": 10, "enable_confidence_head": False},
    "rank-0": {"markov_rank": 0, "confidence_head_with_markov": False, "num_hidden_layers": 1},
    "biases": {"attention_bias": True, "block_size": 7, "rope_theta": 500.0},
    "draft-probs": {"confidence_head_with_draft_probs": True},
    "draft-probs-few": {"confidence_head_with_draft_probs": True, "draft_vocab_size": 3, "markov_head_type": "rnn"},
    "draft-vocabulary": {"draft_vocab_size": 40},
    "draft-vocabulary-rnn": {"draft_vocab_size": 259, "markov_head_type": "rnn"},
    "draft-vocabulary-rank-0": {"draft_vocab_size": 3, "markov_rank": 0, "confidence_head_with_markov": False},
}


@pytest.mark.parametrize("name", DRAFTERS)
@torch.no_grad()
def test_drafter_equals_the_formulas(
    name: str, tmp_path: Path, make_target: Checkpoint, make_drafter: Checkpoint, stack: ExitStack
) -> None:
    source = make_target(tmp_path / "target", tie_word_embeddings=name == "gated")
    folder = make_drafter(tmp_path / "drafter", source, **DRAFTERS[name])
    pair = open_pair(stack, source, folder)
    config = pair.drafter_config
    assert config is not None
    target = load_target(pair)
    with torch.device("meta"):
        drafter = pair.build_drafter(CAPACITY, config.head_size, None, torch.float32)
    load_module(drafter, pair.drafter_sources(CAPACITY))
    weights = load_file(folder / "model.safetensors")
    seen: list[torch.Tensor] = []
    assert target.context is not None
    target.context.register_forward_pre_hook(lambda _, given: seen.append(given[0]))

    ids = torch.randint(0, 256, (1, 20), generator=torch.Generator().manual_seed(3))
    past, context = empty_caches(pair.target_config), empty_caches(config.backbone)
    begin = 0
    for width in (9, 1, 5):
        rows = torch.tensor([[0]])
        _, past, context = target(ids[:, begin : begin + width], torch.tensor([begin]), rows, past, context)
        begin += width
        anchor = ids[:, begin]
        noise = torch.zeros(1, config.block_size, config.head_size)
        given = drafter(anchor, torch.tensor([begin]), torch.zeros(1), noise, context)
        draft_ids, confidence_logits, candidate_ids, candidate_probs, base_logits, _ = given

        hidden, base = plain_block(weights, config, torch.cat(seen, dim=1)[0], int(anchor))
        drafted = weights.get("draft_vocab_ids", torch.arange(260))
        assert torch.allclose(base_logits[0], base[:, drafted], atol=TOLERANCE, rtol=0)
        expected_ids, confidences, probs = plain_walk(weights, config, hidden, base, int(anchor))
        assert draft_ids[0].tolist() == expected_ids
        assert all(row.sort().values.equal(drafted) for row in candidate_ids[0])
        assert torch.allclose(candidate_probs[0], probs.gather(1, candidate_ids[0]), atol=TOLERANCE, rtol=0)
        if config.confidence:
            assert torch.allclose(confidence_logits[0], torch.tensor(confidences), atol=TOLERANCE, rtol=0)
        else:
            assert confidence_logits is None


@pytest.mark.parametrize("candidates", [2, 20])
@torch.no_grad()
def test_a_confidence_knows_nothing_of_its_own_draft(
    candidates: int, tmp_path: Path, make_target: Checkpoint, make_drafter: Checkpoint, stack: ExitStack
) -> None:
    """What is drawn for a position changes no confidence up to its own: verifying by them is lossless."""
    source = make_target(tmp_path / "target")
    folder = make_drafter(tmp_path / "drafter", source, confidence_head_with_draft_probs=True)
    pair = open_pair(stack, source, folder)
    config = pair.drafter_config
    assert config is not None
    with torch.device("meta"):
        drafter = pair.build_drafter(CAPACITY, candidates, None, torch.float32)
    load_module(drafter, pair.drafter_sources(CAPACITY))
    generator = torch.Generator().manual_seed(0)
    block, context = config.block_size, empty_caches(config.backbone)
    noise = torch.randn(1, block, candidates, generator=generator)

    def draft() -> tuple[torch.Tensor, torch.Tensor]:
        ids, confidences, *_ = drafter(torch.tensor([5]), torch.tensor([0]), torch.ones(1), noise, context)
        return ids[0], confidences[0]

    ids, confidences = draft()
    noise[0, 1] = -noise[0, 1]
    noise[0, 1, int(noise[0, 1].argmin())] -= 100  # another one is drawn for certain
    noise[0, 1, (int(noise[0, 1].argmin()) + 1) % candidates] += 100
    others, changed = draft()
    assert others[0] == ids[0] and others[1] != ids[1]
    assert changed[:2].equal(confidences[:2]) and not changed[2:].equal(confidences[2:])
