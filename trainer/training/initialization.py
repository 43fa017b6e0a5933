"""What a drafter starts from."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.exporter.modules.layers import DecoderLayer
from dspark_edge.trainer.target_model import TargetModel
from dspark_edge.trainer.training.continuation import continue_from
from dspark_edge.trainer.training.drafter_model import TrainableDrafter
from dspark_edge.trainer.training.look_back import look_back

__all__ = ["WARM_STARTS", "initialize"]

WARM_STARTS = ("none", "recent", "target")
"""none: random layers; recent: random layers whose attention looks at the latest context, see `look_back`; target:
copies of the target's last layers, and of what the last tap looks like to them. Anything else is the folder of a
drafter to go on from."""

_STD = 0.02


def initialize(
    drafter: TrainableDrafter,
    target: TargetModel,
    warm_start: str,
    seed: int,
    sample: torch.Tensor | None = None,
    vocabulary_ids: np.ndarray | None = None,
) -> None:
    """Fill all parameters.

    Args:
        drafter: on the CPU.
        target: what it drafts for.
        warm_start: one of `WARM_STARTS`, or a drafter's folder.
        seed: of the random values.
        sample: [N, T·d] features of some tokens. The drafter sees each of the T·d at one size.
        vocabulary_ids: [P] of the draft vocabulary; None: the whole vocabulary.

    Raises:
        InvalidInputError: the target's layers, or the drafter to go on from, do not fit, or a warm start lacks the
            sample it needs.
        CheckpointError: the drafter to go on from is missing or damaged.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in drafter.named_parameters():
        with torch.no_grad():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif name.endswith("bias") or name == "markov_head.markov_w2.weight":
                parameter.zero_()  # at first the head is the target's own
            elif "layers" in name and name.endswith(("o_proj.weight", "down_proj.weight")):
                # Residual branches start small, the smaller the deeper the stack (GPT-2).
                parameter.normal_(0.0, _STD / math.sqrt(2 * len(drafter.layers)), generator=generator)
            else:
                parameter.normal_(0.0, _STD, generator=generator)
    if drafter.markov_head is not None:
        _embed_edges(drafter.markov_head.markov_w1, target.embedding.detach().float().cpu())
        if drafter.markov_head.kind == "rnn":
            _pass_edges(drafter.markov_head.joint_proj, drafter.markov_head.rank)
    with torch.no_grad():
        # The head is the target's: it expects states of the size that the target's last norm gives them.
        drafter.norm.weight.copy_(target.module.norm.weight)
        if sample is not None:
            drafter.feature_scale.copy_(1.0 / sample.float().square().mean(dim=0).sqrt().clamp(min=1e-6))
    if warm_start == "recent":
        if sample is None:
            raise InvalidInputError("the warm start 'recent' needs a sample of features")
        look_back(drafter, target.embedding.detach().float().cpu(), sample)
    elif warm_start == "target":
        _copy_layers(drafter, target)
    elif warm_start != "none":
        continue_from(drafter, Path(warm_start), vocabulary_ids)


@torch.no_grad()
def _embed_edges(edges: nn.Embedding, embedding: torch.Tensor) -> None:
    """Start W1 from the principal components of the target's embedding [V, d].

    From random rows the head would have to see a token often before it knew what follows it; so tokens that the
    target holds for alike start alike.
    """
    rank = edges.weight.shape[1]
    centred = embedding - embedding.mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    used = min(rank, vectors.shape[1])
    projected = centred @ vectors[:, -used:].flip(1)
    # The signs of eigenvectors are arbitrary: fixed, so that libraries agree.
    projected *= torch.sign(projected[projected.abs().argmax(dim=0), torch.arange(used)])
    edges.weight[:, :used] = projected / projected.std()


@torch.no_grad()
def _pass_edges(joint: nn.Linear, rank: int) -> None:
    """Let an rnn head begin as a vanilla one: its output is the edge, squashed; the state comes in by training."""
    output = joint.weight[2 * rank :]
    output.zero_()
    output[:, rank : 2 * rank] = torch.eye(rank)


@torch.no_grad()
def _copy_layers(drafter: TrainableDrafter, target: TargetModel) -> None:
    backbone = drafter.config.backbone
    own, theirs = backbone, target.config
    same = (own.num_attention_heads, own.num_key_value_heads, own.head_dim, own.intermediate_size) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
        theirs.intermediate_size,
    )
    if not same or own.num_layers > theirs.num_layers:
        raise InvalidInputError("a warm start needs a drafter whose layers have the target's shape")
    first = theirs.num_layers - own.num_layers
    for index, layer in enumerate(drafter.layers):
        source = target.module.layers[first + index]
        if not isinstance(source, DecoderLayer):
            raise InvalidInputError("a warm start needs a target of plain decoder layers")
        attention, mlp = layer.self_attn, layer.mlp
        sizes = [own.query_size, own.key_value_size, own.key_value_size]
        parts = source.self_attn.qkv_proj.weight.split(sizes, dim=1)
        for projection, part in zip((attention.q_proj, attention.k_proj, attention.v_proj), parts, strict=True):
            projection.weight.copy_(part.T)
        attention.o_proj.weight.copy_(source.self_attn.o_proj.weight.T)
        gate, up = source.mlp.gate_up_proj.weight.chunk(2, dim=1)
        mlp.gate_proj.weight.copy_(gate.T)
        mlp.up_proj.weight.copy_(up.T)
        mlp.down_proj.weight.copy_(source.mlp.down_proj.weight.T)
        layer.input_layernorm.weight.copy_(source.input_layernorm.weight)
        layer.post_attention_layernorm.weight.copy_(source.post_attention_layernorm.weight)
        for norm in ("q_norm", "k_norm"):
            copied = getattr(source.self_attn, norm)
            if isinstance(copied, nn.Identity):
                # The target does not norm its heads. At 2.5 a head of 64 has the size that the target's usually have;
                # training finds the rest.
                getattr(attention, norm).weight.fill_(2.5)
            else:
                getattr(attention, norm).weight.copy_(copied.weight)
    hidden = own.hidden_size
    drafter.fc.weight.zero_()
    drafter.fc.weight[:, -hidden:] = torch.eye(hidden) / drafter.feature_scale[-hidden:]
    drafter.hidden_norm.weight.copy_(target.module.layers[first].input_layernorm.weight)
