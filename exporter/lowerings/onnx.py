"""The `onnx` lowering: standard operators of opset 24, for TensorRT ≥ 10.15 and ONNX Runtime (CUDA, batches on CPU)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from onnxscript.onnx_opset import opset24 as op

from dspark_edge.exporter.lowerings import Lowering, common

__all__ = ["LOWERING"]


def _rotate(states: Any, heads: int, size: int, positions: Any, cos: Any, sin: Any) -> Any:
    """[B, W, heads·D] → rotated [B, heads, W, D]."""
    return op.RotaryEmbedding(common.split_heads(op, states, heads, size), cos, sin, positions)


def write_cache(
    key: Any,
    value: Any,
    past_key: Any,
    past_value: Any,
    cache_lengths: Any,
    positions: Any,
    cos: Any,
    sin: Any,
) -> tuple[Any, Any]:
    heads, size, _ = common.heads_of(past_key, key)
    rotated = _rotate(key, heads, size, positions, cos, sin)
    present_key = op.TensorScatter(past_key, rotated, cache_lengths, axis=-2)
    present_value = op.TensorScatter(past_value, common.split_heads(op, value, heads, size), cache_lengths, axis=-2)
    return present_key, present_value


def cached_attention(
    query: Any,
    key: Any,
    value: Any,
    past_key: Any,
    past_value: Any,
    cache_lengths: Any,
    positions: Any,
    cos: Any,
    sin: Any,
    causal: bool,
    scale: float,
) -> tuple[Any, Any, Any]:
    _, size, heads = common.heads_of(past_key, query)
    present_key, present_value = write_cache(key, value, past_key, past_value, cache_lengths, positions, cos, sin)
    mask = common.visible(op, positions, past_key, causal)
    # Only Q, K, V and a mask: what TensorRT's parser takes. Grouped heads are the operator's own business.
    output, *_ = op.Attention(
        _rotate(query, heads, size, positions, cos, sin), present_key, present_value, mask, scale=scale
    )
    return common.merge_heads(op, output), present_key, present_value


LOWERING = Lowering(
    name="onnx",
    opset=24,
    context_opset=24,
    translations={
        torch.ops.dspark.cached_attention.default: cached_attention,
        torch.ops.dspark.write_cache.default: write_cache,
        torch.ops.dspark.rms_norm.default: partial(common.rms_norm, op),
        **common.shared_translations(op),
    },
    dynamic_capacity=False,  # TensorRT's KV_CACHE_UPDATE wants a static capacity
    batched=True,
    low_bit=("int8", "int4", "w4a16"),
)
