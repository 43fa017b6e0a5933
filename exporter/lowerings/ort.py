"""The `ort` lowering: ONNX Runtime's GroupQueryAttention, which costs by the valid length instead of the capacity."""

from __future__ import annotations

from functools import partial
from typing import Any

import onnx
import torch
from onnxscript import values
from onnxscript.onnx_opset import opset23 as op

from dspark_edge.exporter.lowerings import Lowering, common
from dspark_edge.exporter.lowerings.onnx import write_cache
from dspark_edge.exporter.lowerings.ort_rewrites import FuseSkipNorm, PackQueryKeyValue

__all__ = ["LOWERING"]


def _group_query_attention() -> values.Op:
    """The contrib operator, described here because onnx has no schema of ONNX Runtime's own operators."""
    schema = onnx.defs.OpSchema
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
    inputs = ("query", "key", "value", "past_key", "past_value")
    lengths = ("seqlens_k", "total_sequence_length")
    attributes = ("num_heads", "kv_num_heads", "do_rotary", "causal")
    return values.Op(
        values.Opset("com.microsoft", 1),
        "GroupQueryAttention",
        schema(
            "GroupQueryAttention",
            "com.microsoft",
            1,
            inputs=[
                *(schema.FormalParameter(name, "T") for name in inputs),
                *(schema.FormalParameter(name, "M") for name in lengths),
                *(schema.FormalParameter(name, "T") for name in ("cos_cache", "sin_cache")),
            ],
            outputs=[schema.FormalParameter(name, "T") for name in ("output", "present_key", "present_value")],
            type_constraints=[("T", floats, ""), ("M", ["tensor(int32)"], "")],
            attributes=[
                *(schema.Attribute(name, schema.AttrType.INT, required=False) for name in attributes),
                schema.Attribute("scale", schema.AttrType.FLOAT, required=False),
            ],
        ),
    )


_GroupQueryAttention = _group_query_attention()


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
    key_value_heads, _, heads = common.heads_of(past_key, query)
    # [B] index of the last valid slot, and the longest valid length of the batch.
    last = op.Cast(op.ReduceMax(positions, common.ints(op, 1), keepdims=0), to=common.INT32)
    longest = op.Add(op.ReduceMax(positions, keepdims=0), common.scalar(op, 1))
    total = op.Cast(longest, to=common.INT32)
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": key_value_heads, "do_rotary": 1, "scale": scale}
    if not causal:
        # Known from ONNX Runtime 1.29.1; left out where it is the default, so that older releases load the target.
        attributes["causal"] = 0
    output, present_key, present_value = _GroupQueryAttention(
        query, key, value, past_key, past_value, last, total, cos, sin, **attributes
    )
    return output, present_key, present_value


LOWERING = Lowering(
    name="ort",
    opset=23,  # the newest that Python 3.10's last ONNX Runtime (1.23) reads
    context_opset=24,  # TensorScatter
    translations={
        torch.ops.dspark.cached_attention.default: cached_attention,
        torch.ops.dspark.write_cache.default: write_cache,
        torch.ops.dspark.rms_norm.default: partial(common.rms_norm, op),
        **common.shared_translations(op),
    },
    dynamic_capacity=True,
    batched=False,
    low_bit=("int8", "int4"),
    rewrites=(PackQueryKeyValue, FuseSkipNorm),
    packs=True,
)
