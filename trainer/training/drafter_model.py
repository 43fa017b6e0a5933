"""The drafter for training: many blocks of a sequence in one masked forward pass.

Parameters carry DeepSpec's names, so that the state dict is the checkpoint. Embedding and head are the target's and
stay outside.

Shapes: B sequences, S tokens, A anchors a sequence, γ block size, M = A·γ block rows, T taps, P draft vocabulary,
r Markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dspark_edge.exporter.configuration import DecoderConfig, DrafterConfig
from dspark_edge.exporter.modules.drafter import PEAK_FEATURES
from dspark_edge.exporter.weights import rotary_tables
from dspark_edge.trainer.target_model import rotate

__all__ = ["Blocks", "TrainableDrafter"]


@dataclass(frozen=True, slots=True)
class Blocks:
    """What the drafter says of the blocks."""

    hidden: torch.Tensor  # [B, A, γ, d] behind the final norm
    markov: torch.Tensor | None  # [B, A, γ, r], what W2 projects on the vocabulary
    confidence_logits: torch.Tensor | None  # [B, A, γ], without what the draft's distribution adds; see `peak_weights`


class _Norm(nn.Module):
    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(states.float(), self.weight.shape, self.weight.float(), self.epsilon).to(
            states.dtype
        )


class _Attention(nn.Module):
    """Rows of blocks attend to the context before their anchor and to their own block, in both directions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.attention_bias
        self.head_dim, self.groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, config.query_size, bias=bias)
        self.k_proj = nn.Linear(hidden, config.key_value_size, bias=bias)
        self.v_proj = nn.Linear(hidden, config.key_value_size, bias=bias)
        self.o_proj = nn.Linear(config.query_size, hidden, bias=bias)
        self.q_norm = _Norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = _Norm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        states: torch.Tensor,  # [B, M, d] behind the input norm
        context: torch.Tensor,  # [B, S, d]: fc and hidden_norm, no input norm
        rotary: tuple[torch.Tensor, torch.Tensor],  # cos, sin [B, 1, M, D/2] of the block rows
        context_rotary: tuple[torch.Tensor, torch.Tensor],  # [1, 1, S, D/2]
        mask: torch.Tensor,  # [B, 1, M, S+M] bool, true where a row may look
    ) -> torch.Tensor:
        query = rotate(self._split(self.q_norm, self.q_proj(states)), *rotary)
        key = rotate(self._split(self.k_norm, self.k_proj(states)), *rotary)
        past = rotate(self._split(self.k_norm, self.k_proj(context)), *context_rotary)
        keys = torch.cat((past, key), dim=2)
        values = torch.cat((self._split(None, self.v_proj(context)), self._split(None, self.v_proj(states))), dim=2)
        attended = functional.scaled_dot_product_attention(
            query,
            keys.repeat_interleave(self.groups, dim=1),
            values.repeat_interleave(self.groups, dim=1),
            attn_mask=mask,
        )
        batch, _, rows, _ = attended.shape
        output: torch.Tensor = self.o_proj(attended.transpose(1, 2).reshape(batch, rows, -1))
        return output

    def _split(self, norm: nn.Module | None, states: torch.Tensor) -> torch.Tensor:
        """[B, S, heads·D] → [B, heads, S, D]."""
        heads = states.unflatten(-1, (-1, self.head_dim))
        return (heads if norm is None else norm(heads)).transpose(1, 2)


class _MLP(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(states)) * self.up_proj(states))
        return output


class _Layer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = _Norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _MLP(config)

    def forward(
        self,
        states: torch.Tensor,
        context: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        context_rotary: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        normed = self.input_layernorm(states)
        states = states + self.self_attn(normed, context, rotary, context_rotary, mask)
        states = states + self.mlp(self.post_attention_layernorm(states))
        return states


class _MarkovHead(nn.Module):
    """The sequential head, taught with the tokens that really came (teacher forcing)."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        rank, hidden = config.markov_rank, config.backbone.hidden_size
        self.kind, self.rank = config.markov_head, rank
        self.markov_w1 = nn.Embedding(config.backbone.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, config.draft_vocab_size or config.backbone.vocab_size, bias=False)
        if self.kind == "gated":
            self.gate_proj = nn.Linear(hidden + rank, rank)
        elif self.kind == "rnn":
            self.joint_proj = nn.Linear(2 * rank + hidden, 3 * rank)

    def forward(self, edges: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """edges [B, A, γ, r] = W1[x_{k−1}], hidden [B, A, γ, d] → what W2 projects, [B, A, γ, r]."""
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat((hidden, edges), dim=-1))) * edges
        if self.kind != "rnn":
            return edges
        state = torch.zeros_like(edges[:, :, 0])
        outputs = []
        for step in range(edges.shape[2]):
            joint = self.joint_proj(torch.cat((state, edges[:, :, step], hidden[:, :, step]), dim=-1))
            gate, content, output = joint.split([self.rank] * 3, dim=-1)
            gate = torch.sigmoid(gate)
            state = gate * state + (1.0 - gate) * torch.tanh(content)
            outputs.append(torch.tanh(output))
        return torch.stack(outputs, dim=2)


class _ConfidenceHead(nn.Module):
    """A linear head; `peaks` of its inputs come last and later, where logits are known."""

    def __init__(self, inputs: int, peaks: int) -> None:
        super().__init__()
        self.inputs, self.peaks = inputs, peaks
        self.proj = nn.Linear(inputs + peaks, 1)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        weight = self.proj.weight[:, : self.inputs]
        logits: torch.Tensor = functional.linear(features, weight, self.proj.bias).squeeze(-1)
        return logits


class TrainableDrafter(nn.Module):
    """A drafter whose state dict is a DeepSpec checkpoint without copies of embedding and head.

    Args:
        config: its shape.
        positions: longest sequence, tokens.
    """

    def __init__(self, config: DrafterConfig, positions: int) -> None:
        super().__init__()
        self.config = config
        backbone = config.backbone
        hidden = backbone.hidden_size
        self.fc = nn.Linear(len(config.tap_layers) * hidden, hidden, bias=False)
        self.hidden_norm = _Norm(hidden, backbone.rms_norm_eps)
        self.layers = nn.ModuleList(_Layer(backbone) for _ in range(backbone.num_layers))
        self.norm = _Norm(hidden, backbone.rms_norm_eps)
        self.markov_head = _MarkovHead(config) if config.markov_rank else None
        inputs = hidden + (config.markov_rank if config.confidence_with_markov else 0)
        peaks = PEAK_FEATURES if config.confidence_with_draft_probs else 0
        self.confidence_head = _ConfidenceHead(inputs, peaks) if config.confidence else None
        cos, sin = rotary_tables(backbone, positions + config.block_size)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        # Residual streams have a few dimensions a hundred times larger than the others, and late layers are ten times
        # larger than early ones. Unscaled, these few would be all that hidden_norm lets through at first.
        scale = torch.ones(len(config.tap_layers) * hidden)
        self.register_buffer("feature_scale", scale, persistent=False)
        self.checkpoint_layers = False

    @property
    def peak_weights(self) -> torch.Tensor | None:
        """[3], what each of the draft distribution's `peak_features` adds to a confidence; None: nothing."""
        head = self.confidence_head
        return head.proj.weight[0, head.inputs :] if head is not None and head.peaks else None

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        """The state dict in DeepSpec's form: the scale of the features is part of fc."""
        tensors = {name: tensor.detach() for name, tensor in self.state_dict().items()}
        tensors["fc.weight"] = tensors["fc.weight"] * self.feature_scale
        return tensors

    def forward(
        self,
        features: torch.Tensor,
        embeddings: torch.Tensor,
        anchors: torch.Tensor,
        previous_ids: torch.Tensor,
    ) -> Blocks:
        """Draft behind every anchor.

        Args:
            features: [B, S, T·d], the target's tapped layers; each block sees those before its anchor.
            embeddings: [B, A, 2, d], the target's embeddings of each block's anchor and of the mask token.
            anchors: [B, A] int64, the anchors' positions.
            previous_ids: [B, A, γ] int64, the token before each draft position: x₀ … x_{γ−1}.
        """
        batch, count, block = previous_ids.shape  # training may use shorter blocks than drafting
        # fc in fp32 whatever the rest runs in: residual streams are known to pass 2·10⁴ (see the exporter's).
        with torch.autocast(features.device.type, enabled=False):
            context = self.hidden_norm(self.fc(features.float() * self.feature_scale))
        states = torch.cat((embeddings[:, :, :1], embeddings[:, :, 1:].expand(-1, -1, block - 1, -1)), dim=2)
        states = states.reshape(batch, count * block, -1)
        positions = (anchors[..., None] + torch.arange(block, device=anchors.device)).reshape(batch, -1)
        rotary = (self.cos[positions][:, None], self.sin[positions][:, None])
        length = features.shape[1]
        context_rotary = (self.cos[:length][None, None], self.sin[:length][None, None])
        mask = block_mask(anchors, length, block)
        for layer in self.layers:
            arguments = (states, context, rotary, context_rotary, mask)
            if self.checkpoint_layers and self.training:
                states = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                states = layer(*arguments)
        hidden = self.norm(states).reshape(batch, count, block, -1)
        markov, confidence_input = None, hidden
        if self.markov_head is not None:
            edges = self.markov_head.markov_w1(previous_ids)
            markov = self.markov_head(edges, hidden)
            if self.config.confidence_with_markov:
                confidence_input = torch.cat((hidden, edges.to(hidden.dtype)), dim=-1)
        confidence = self.confidence_head(confidence_input) if self.confidence_head is not None else None
        return Blocks(hidden, markov, confidence)


def block_mask(anchors: torch.Tensor, length: int, block: int) -> torch.Tensor:
    """Which keys a row may look at: the context before its anchor, and its own block.

    Args:
        anchors: [B, A] int64.
        length: S.
        block: γ.

    Returns:
        [B, 1, A·γ, S + A·γ] bool.
    """
    batch, count = anchors.shape
    device = anchors.device
    context = torch.arange(length, device=device) < anchors[..., None]  # [B, A, S]
    context = context[:, :, None].expand(-1, -1, block, -1).reshape(batch, count * block, length)
    owner = torch.arange(count, device=device).repeat_interleave(block)
    own = (owner[:, None] == owner[None]).expand(batch, -1, -1)
    return torch.cat((context, own), dim=-1)[:, None]
