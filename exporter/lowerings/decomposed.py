"""The `decomposed` lowering: opset 18 and nothing newer, for TensorRT 10.3 (JetPack 6) and other old runtimes."""

from __future__ import annotations

from typing import Any

import torch
from onnxscript.onnx_opset import opset18 as op

from dspark_edge.exporter.lowerings import Lowering, common

__all__ = ["LOWERING"]


def _rotate(states: Any, heads: int, size: int, positions: Any, cos: Any, sin: Any) -> Any:
    """[B, W, heads·D] → rotated [B, heads, W, D]."""
    cos_rows = op.Unsqueeze(op.Gather(cos, positions), common.ints(op, 1))  # [B, 1, W, D/2]
    sin_rows = op.Unsqueeze(op.Gather(sin, positions), common.ints(op, 1))
    split = common.split_heads(op, states, heads, size)
    first = op.Slice(split, common.ints(op, 0), common.ints(op, size // 2), common.ints(op, 3))
    second = op.Slice(split, common.ints(op, size // 2), common.ints(op, size), common.ints(op, 3))
    return op.Concat(
        op.Sub(op.Mul(first, cos_rows), op.Mul(second, sin_rows)),
        op.Add(op.Mul(second, cos_rows), op.Mul(first, sin_rows)),
        axis=3,
    )


def _write(past: Any, update: Any, positions: Any) -> Any:
    heads, size = int(past.shape[1]), int(past.shape[3])
    index = op.Expand(op.Unsqueeze(positions, common.ints(op, 1, 3)), common.ints(op, 1, heads, 1, size))
    return op.ScatterElements(past, index, update, axis=2)


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
    return (
        _write(past_key, _rotate(key, heads, size, positions, cos, sin), positions),
        _write(past_value, common.split_heads(op, value, heads, size), positions),
    )


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
    key_value_heads, size, heads = common.heads_of(past_key, query)
    present_key, present_value = write_cache(key, value, past_key, past_value, cache_lengths, positions, cos, sin)
    rotated = _rotate(query, heads, size, positions, cos, sin)
    # Query heads that share a key/value head are laid beside the key as one group: no copy of the cache per head.
    grouped = op.Reshape(rotated, common.ints(op, 0, key_value_heads, heads // key_value_heads, -1, size))
    keys = op.Unsqueeze(op.Transpose(present_key, perm=[0, 1, 3, 2]), common.ints(op, 2))
    scores = op.Cast(op.MatMul(grouped, keys), to=common.FLOAT)
    mask = op.Unsqueeze(common.visible(op, positions, past_key, causal), common.ints(op, 1))
    scores = op.Where(mask, op.Mul(scores, op.Constant(value_float=scale)), op.Constant(value_float=-1e30))
    weights = op.CastLike(op.Softmax(scores, axis=-1), query)
    output = op.MatMul(weights, op.Unsqueeze(present_value, common.ints(op, 2)))
    merged = op.Reshape(output, common.ints(op, 0, heads, -1, size))
    return common.merge_heads(op, merged), present_key, present_value


def rms_norm(states: Any, weight: Any, epsilon: float) -> Any:
    wide = op.Cast(states, to=common.FLOAT)
    mean = op.ReduceMean(op.Mul(wide, wide), common.ints(op, -1), keepdims=1)
    scaled = op.Div(wide, op.Sqrt(op.Add(mean, op.Constant(value_float=epsilon))))
    return op.Mul(op.CastLike(scaled, states), weight)


LOWERING = Lowering(
    name="decomposed",
    opset=18,
    context_opset=18,
    translations={
        torch.ops.dspark.cached_attention.default: cached_attention,
        torch.ops.dspark.write_cache.default: write_cache,
        torch.ops.dspark.rms_norm.default: rms_norm,
        **common.shared_translations(op),
    },
    dynamic_capacity=False,
    batched=True,
)
