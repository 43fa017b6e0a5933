"""The pieces that target and drafter are made of, written for tracing.

Projections keep their weight as [in, out], so that ONNX gets a plain MatMul with a constant right side; query, key
and value share one projection, and so do gate and up.
"""

from __future__ import annotations

import torch
from torch import nn

from dspark_edge.exporter import operators
from dspark_edge.exporter.configuration import DecoderConfig

__all__ = ["DecoderLayer", "Embedding", "HeadNorm", "Projection", "RMSNorm", "RotaryTable", "row_positions"]


def row_positions(cache_lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Positions [B, W] int64 of the rows that stand behind cache_lengths [B]."""
    return cache_lengths[:, None] + torch.arange(width, device=cache_lengths.device)


class Projection(nn.Module):
    """x [..., in] → [..., out], weight [in, out]."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states = states @ self.weight
        return states if self.bias is None else states + self.bias


class Embedding(nn.Module):
    """ids [...] → rows of weight [V, d]."""

    def __init__(self, vocab_size: int, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size, dtype=dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32."""

    def __init__(self, size: int, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))
        self.epsilon = epsilon

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = operators.rms_norm(states, self.weight, self.epsilon)
        return normed


class HeadNorm(RMSNorm):
    """RMSNorm of every head: [B, W, heads·D] → the same."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        batch, width, size = states.shape
        heads = states.reshape(batch, width, size // self.weight.shape[0], self.weight.shape[0])
        return super().forward(heads).reshape(batch, width, size)


class RotaryTable(nn.Module):
    """cos and sin of every position below the capacity, [P, D/2]; filled by `rotary_tables`."""

    def __init__(self, positions: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.cos = nn.Parameter(torch.empty(positions, head_dim // 2, dtype=dtype))
        self.sin = nn.Parameter(torch.empty(positions, head_dim // 2, dtype=dtype))


class Attention(nn.Module):
    """Self-attention over a cache that is updated in place."""

    def __init__(self, config: DecoderConfig, causal: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.query_size, self.key_value_size = config.query_size, config.key_value_size
        self.causal = causal
        self.scale = config.head_dim**-0.5
        self.qkv_proj = Projection(
            config.hidden_size, config.query_size + 2 * config.key_value_size, config.attention_bias, dtype
        )
        self.o_proj = Projection(config.query_size, config.hidden_size, config.attention_bias, dtype)
        self.q_norm = HeadNorm(config.head_dim, config.rms_norm_eps, dtype) if config.qk_norm else nn.Identity()
        self.k_norm = HeadNorm(config.head_dim, config.rms_norm_eps, dtype) if config.qk_norm else nn.Identity()

    def forward(
        self,
        states: torch.Tensor,  # [B, W, d]
        past_key: torch.Tensor,  # [B, K, C, D]
        past_value: torch.Tensor,  # [B, K, C, D]
        cache_lengths: torch.Tensor,  # [B] int64
        positions: torch.Tensor,  # [B, W] int64
        rotary: RotaryTable,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = [self.query_size, self.key_value_size, self.key_value_size]
        query, key, value = self.qkv_proj(states).split(sizes, dim=-1)
        output, present_key, present_value = operators.cached_attention(
            self.q_norm(query),
            self.k_norm(key),
            value,
            past_key,
            past_value,
            cache_lengths,
            positions,
            rotary.cos,
            rotary.sin,
            self.causal,
            self.scale,
        )
        return self.o_proj(output), present_key, present_value


class MLP(nn.Module):
    """SwiGLU feed-forward, gate and up in one projection."""

    def __init__(self, config: DecoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.size = config.intermediate_size
        self.gate_up_proj = Projection(config.hidden_size, 2 * self.size, config.mlp_bias, dtype)
        self.down_proj = Projection(self.size, config.hidden_size, config.mlp_bias, dtype)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(states).split([self.size, self.size], dim=-1)
        output: torch.Tensor = self.down_proj(gate * torch.sigmoid(gate) * up)
        return output


class DecoderLayer(nn.Module):
    """Pre-norm decoder layer of the Llama and Qwen3 families; `causal=False` makes it a drafter's block layer."""

    def __init__(self, config: DecoderConfig, causal: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.self_attn = Attention(config, causal, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.mlp = MLP(config, dtype)

    def forward(
        self,
        states: torch.Tensor,
        past_key: torch.Tensor,
        past_value: torch.Tensor,
        cache_lengths: torch.Tensor,
        positions: torch.Tensor,
        rotary: RotaryTable,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attended, present_key, present_value = self.self_attn(
            self.input_layernorm(states), past_key, past_value, cache_lengths, positions, rotary
        )
        states = states + attended
        return states + self.mlp(self.post_attention_layernorm(states)), present_key, present_value
