"""The target graph: prefill, plain decoding and verification at different widths.

With a DSpark drafter, the graph also writes the drafter's context keys and values for every token it sees: they are
a pure function of the tapped features, so the drafter's cache can never fall behind the target's.
"""

from __future__ import annotations

import torch
from torch import nn

from dspark_edge.exporter import operators
from dspark_edge.exporter.configuration import EMBEDDING_TAP, DecoderConfig, DrafterConfig
from dspark_edge.exporter.modules.layers import (
    DecoderLayer,
    Embedding,
    HeadNorm,
    Projection,
    RMSNorm,
    RotaryTable,
    row_positions,
)

__all__ = ["ContextProjection", "Target"]


class ContextProjection(nn.Module):
    """Tapped features → the drafter's context keys and values (reference: fc → hidden_norm → k, v → k_norm → RoPE).

    `fc` runs in fp32: its inputs are residual streams that are known to pass 2·10⁴, and it sums over T·d of them.
    """

    def __init__(self, config: DrafterConfig, positions: int, dtype: torch.dtype) -> None:
        super().__init__()
        backbone = config.backbone
        self.dtype = dtype
        self.num_layers, self.size = backbone.num_layers, backbone.key_value_size
        self.fc = Projection(len(config.tap_layers) * backbone.hidden_size, backbone.hidden_size)
        self.hidden_norm = RMSNorm(backbone.hidden_size, backbone.rms_norm_eps, torch.float32)
        # Keys and values of all drafter layers in one projection: k0 v0 k1 v1 …
        self.kv_proj = Projection(backbone.hidden_size, 2 * self.num_layers * self.size, backbone.attention_bias, dtype)
        self.k_norm = nn.ModuleList(
            HeadNorm(backbone.head_dim, backbone.rms_norm_eps, dtype) for _ in range(self.num_layers)
        )
        self.rotary = RotaryTable(positions, backbone.head_dim, dtype)

    def forward(
        self, features: torch.Tensor, cache_lengths: torch.Tensor, positions: torch.Tensor, past: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        context = self.hidden_norm(self.fc(features.float())).to(self.dtype)
        parts = self.kv_proj(context).split([self.size] * (2 * self.num_layers), dim=-1)
        present: list[torch.Tensor] = []
        for layer, norm in enumerate(self.k_norm):
            key, value = parts[2 * layer], parts[2 * layer + 1]
            present += operators.write_cache(
                norm(key),
                value,
                past[2 * layer],
                past[2 * layer + 1],
                cache_lengths,
                positions,
                self.rotary.cos,
                self.rotary.sin,
            )
        return present


class Target(nn.Module):
    """The target model with its caches as arguments.

    Args of forward:
        input_ids: [B, W] int64; row b stands at positions cache_lengths[b] … +W−1.
        cache_lengths: [B] int64.
        logit_rows: [B, N] int64: which of the W rows get logits.
        past: per layer key and value [B, K, C, D], in turn.
        drafter_past: the same for the drafter's layers; empty without a DSpark drafter.

    Returns:
        logits fp32 [B, N, V], then the updated caches in the order of the arguments.
    """

    def __init__(
        self, config: DecoderConfig, drafter: DrafterConfig | None, positions: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, True, dtype) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.rotary = RotaryTable(positions, config.head_dim, dtype)
        self.lm_head = None if config.tie_word_embeddings else Embedding(config.vocab_size, config.hidden_size, dtype)
        self.tap_layers = drafter.tap_layers if drafter else ()
        self.context = ContextProjection(drafter, positions, dtype) if drafter else None

    def forward(
        self,
        input_ids: torch.Tensor,
        cache_lengths: torch.Tensor,
        logit_rows: torch.Tensor,
        past: list[torch.Tensor],
        drafter_past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        states = self.embed_tokens(input_ids)
        positions = row_positions(cache_lengths, input_ids.shape[1])
        taps = {EMBEDDING_TAP: states}
        present: list[torch.Tensor] = []
        for index, layer in enumerate(self.layers):
            caches = (past[2 * index], past[2 * index + 1])
            states, key, value = layer(states, *caches, cache_lengths, positions, self.rotary)
            present += [key, value]
            taps[index] = states

        drafter_present: list[torch.Tensor] = []
        if self.context is not None:
            features = torch.cat([taps[tap] for tap in self.tap_layers], dim=-1)
            drafter_present = self.context(features, cache_lengths, positions, drafter_past)

        # The norm and the head run on the rows that are asked for, not on a whole prefill chunk.
        batch, width, size = states.shape
        first_rows = torch.arange(batch, device=states.device)[:, None] * width
        rows = states.reshape(batch * width, size).index_select(0, (first_rows + logit_rows).reshape(-1))
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        logits = operators.project_vocabulary(self.norm(rows), head.weight).float()
        return logits.reshape(batch, -1, logits.shape[-1]), present, drafter_present
