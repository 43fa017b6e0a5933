"""What the lowerings share: translations that need nothing newer than opset 18, where they do not say so.

Every function takes the onnxscript opset to write with as its first argument, so that each lowering can bind its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import onnx
import torch

__all__ = [
    "BOOL",
    "FLOAT",
    "INT32",
    "INT64",
    "dimension",
    "heads_of",
    "ints",
    "merge_heads",
    "rms_norm",
    "scalar",
    "shared_translations",
    "split_heads",
    "visible",
]

FLOAT, INT32, INT64, BOOL = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.INT32,
    onnx.TensorProto.INT64,
    onnx.TensorProto.BOOL,
)


def ints(op: Any, *values: int) -> Any:
    """A constant [len(values)] int64."""
    return op.Constant(value_ints=list(values))


def scalar(op: Any, value: int) -> Any:
    """A constant scalar int64."""
    return op.Constant(value_int=value)


def dimension(op: Any, tensor: Any, axis: int) -> Any:
    """The size of one axis as [1] int64."""
    return op.Gather(op.Shape(tensor), ints(op, axis))


def split_heads(op: Any, states: Any, heads: int, size: int) -> Any:
    """[B, W, heads·D] → [B, heads, W, D]."""
    return op.Transpose(op.Reshape(states, ints(op, 0, 0, heads, size)), perm=[0, 2, 1, 3])


def merge_heads(op: Any, states: Any) -> Any:
    """[B, heads, W, D] → [B, W, heads·D]."""
    return op.Reshape(op.Transpose(states, perm=[0, 2, 1, 3]), ints(op, 0, 0, -1))


def visible(op: Any, positions: Any, past: Any, causal: bool) -> Any:
    """Which cache slots each row may attend to, [B, 1, W, C] bool, from the rows' positions [B, W]."""
    last = positions if causal else op.ReduceMax(positions, ints(op, 1), keepdims=1)  # [B, W] or [B, 1]
    slots = op.Range(scalar(op, 0), op.Squeeze(dimension(op, past, 2)), scalar(op, 1))
    mask = op.LessOrEqual(slots, op.Unsqueeze(last, ints(op, 1, 3)))
    if causal:
        return mask
    # Some backends broadcast a mask's width, others do not.
    return op.And(mask, op.Unsqueeze(op.GreaterOrEqual(positions, scalar(op, 0)), ints(op, 1, 3)))


def heads_of(past: Any, states: Any) -> tuple[int, int, int]:
    """Key/value heads and head size from a cache [B, K, C, D], and the number of heads in states [B, W, heads·D]."""
    key_value_heads, size = int(past.shape[1]), int(past.shape[3])
    return key_value_heads, size, int(states.shape[2]) // size


def rms_norm(op: Any, states: Any, weight: Any, epsilon: float) -> Any:
    """As one operator; opset 23."""
    return op.RMSNormalization(states, weight, axis=-1, epsilon=epsilon)


def project_vocabulary(op: Any, states: Any, weight: Any) -> Any:
    """Gemm takes the vocabulary matrix as it is stored, [V, d], so that the embedding's initializer serves both."""
    return op.Gemm(states, weight, transB=1)


def cast(op: Any, tensor: Any, dtype: int) -> Any:
    """`aten.to`: to another element type."""
    return op.Cast(tensor, to=dtype)


def subtract_from(op: Any, tensor: Any, other: float, alpha: float = 1.0) -> Any:
    """`aten.rsub`: other − alpha · tensor."""
    scaled = tensor if alpha == 1 else op.Mul(tensor, op.CastLike(op.Constant(value_float=float(alpha)), tensor))
    return op.Sub(op.CastLike(op.Constant(value_float=float(other)), tensor), scaled)


def both(op: Any, left: Any, right: Any) -> Any:
    """`aten.__and__` of booleans."""
    return op.And(left, right)


def either(op: Any, left: Any, right: Any) -> Any:
    """`aten.__or__` of booleans."""
    return op.Or(left, right)


def filter_threshold(op: Any, probs: Any, top_k: Any, top_p: Any, min_p: Any, pool: Any) -> tuple[Any, Any]:
    """See `dspark_edge.exporter.operators.filter_threshold`; TopK's size is the input `pool`."""
    one, zero = op.Constant(value_float=1.0), op.Constant(value_float=0.0)
    vocabulary = dimension(op, probs, 2)
    size = op.Min(pool, vocabulary)
    ranked, _ = op.TopK(probs, size, axis=-1, largest=1, sorted=1)
    limited = op.And(op.Greater(top_k, scalar(op, 0)), op.Less(top_k, vocabulary))
    k = op.Unsqueeze(op.Where(limited, top_k, vocabulary), ints(op, 1, 2))
    ranks = op.Range(scalar(op, 0), op.Squeeze(size), scalar(op, 1))
    within_k = op.Less(ranks, k)
    masses = op.Mul(ranked, op.Cast(within_k, to=FLOAT))
    cumulative = op.CumSum(masses, scalar(op, 2))
    held = op.ReduceMax(cumulative, ints(op, 2), keepdims=0)  # running sums only grow: the last one
    whole = op.Where(op.Unsqueeze(limited, ints(op, 1)), held, one)
    goal = op.Mul(op.Unsqueeze(top_p, ints(op, 1)), whole)
    open_nucleus = op.GreaterOrEqual(top_p, one)
    nucleus = op.Or(
        op.Less(op.Sub(cumulative, masses), op.Unsqueeze(goal, ints(op, 2))),
        op.Unsqueeze(open_nucleus, ints(op, 1, 2)),
    )
    kept = op.ReduceSum(op.Cast(op.And(within_k, nucleus), to=INT64), ints(op, 2), keepdims=1)
    last = op.Sub(op.Max(kept, scalar(op, 1)), scalar(op, 1))
    lowest = op.Squeeze(op.GatherElements(ranked, last, axis=2), ints(op, 2))
    unlimited = op.And(op.Not(limited), open_nucleus)
    threshold = op.Where(op.Unsqueeze(unlimited, ints(op, 1)), zero, lowest)
    floor = op.Mul(op.Unsqueeze(min_p, ints(op, 1)), op.ReduceMax(ranked, ints(op, 2), keepdims=0))
    missing = op.ReduceMax(op.Cast(op.Less(held, goal), to=INT32), ints(op, 1), keepdims=0)
    reached = op.And(op.Equal(missing, op.Cast(scalar(op, 0), to=INT32)), op.Not(open_nucleus))
    by_rank = op.And(limited, op.LessOrEqual(top_k, size))  # ONNX Runtime has no Where on bool
    by_mass = op.And(op.Not(limited), reached)
    covered = op.Or(unlimited, op.Or(by_rank, by_mass))
    return op.Max(threshold, floor), op.Or(covered, op.GreaterOrEqual(size, vocabulary))


def shared_translations(op: Any) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translations that are the same in every lowering, written with opset `op`."""
    return {
        torch.ops.dspark.project_vocabulary.default: partial(project_vocabulary, op),
        torch.ops.dspark.filter_threshold.default: partial(filter_threshold, op),
        # What torch decomposes before it translates, see `dspark_edge.exporter.tracing`.
        torch.ops.aten.to.dtype: partial(cast, op),
        torch.ops.aten.rsub.Scalar: partial(subtract_from, op),
        torch.ops.aten.__and__.Tensor: partial(both, op),
        torch.ops.aten.__or__.Tensor: partial(either, op),
    }
