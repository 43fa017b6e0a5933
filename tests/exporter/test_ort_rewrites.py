"""The `ort` lowering's graph rewrites, on graphs small enough to read."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="lowerings need the [export] extra")

import onnx_ir as ir

from dspark_edge.exporter.lowerings.ort_rewrites import FuseSkipNorm, PackQueryKeyValue

pytestmark = pytest.mark.needs_export

HEADER = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>\n'
ATTENTION = """
agraph (float[1,W,12] qkv, float[1,1,C,4] past_key, float[1,1,C,4] past_value, int32[1] last, int32 total,
        float[C,2] cos, float[C,2] sin) => (float[1,W,4] out, float[1,1,C,4] key, float[1,1,C,4] value EXTRA)
<int64[3] sizes = {4, 4, 4}> {
    q, k, v = Split <axis = -1> (qkv, sizes)
    BETWEEN
    out, key, value = com.microsoft.GroupQueryAttention <num_heads = 1, kv_num_heads = 1, do_rotary = 1>
        (QUERY, k, v, past_key, past_value, last, total, cos, sin)
}
"""
RESIDUAL = """
agraph (float[1,W,4] skip, float[1,W,4] states, float[4] weight) => (float[1,W,4] normed, float[1,W,4] result)
{
    sum = Add(skip, states)
    normed = RMSNormalization <axis = -1, epsilon = 0.5> (sum, weight)
    result = Mul(normed, sum)
}
"""


def parse(text: str, **replacements: str) -> ir.Model:
    for name, value in replacements.items():
        text = text.replace(name, value)
    return ir.from_onnx_text(HEADER + text)


def node_types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_a_split_in_front_of_attention_goes() -> None:
    model = parse(ATTENTION, EXTRA="", BETWEEN="", QUERY="q")
    assert PackQueryKeyValue()(model).modified
    (attention,) = model.graph
    names = [value.name if value is not None else None for value in attention.inputs]
    assert names == ["qkv", None, None, "past_key", "past_value", "last", "total", "cos", "sin"]


def test_a_query_that_is_normed_stays_split() -> None:
    model = parse(ATTENTION, EXTRA="", BETWEEN="normed = Relu(q)", QUERY="normed")
    assert not PackQueryKeyValue()(model).modified
    assert node_types(model) == ["Split", "Relu", "GroupQueryAttention"]


def test_a_query_with_another_reader_stays_split() -> None:
    model = parse(ATTENTION, EXTRA=", float[1,W,4] seen", BETWEEN="seen = Relu(q)", QUERY="q")
    assert not PackQueryKeyValue()(model).modified


def test_addition_and_norm_become_one() -> None:
    model = parse(RESIDUAL)
    assert FuseSkipNorm()(model).modified
    fused, product = model.graph
    assert (fused.domain, fused.op_type) == ("com.microsoft", "SkipSimplifiedLayerNormalization")
    assert [value.name for value in fused.inputs if value is not None] == ["skip", "states", "weight"]
    assert [value.name for value in fused.outputs] == ["normed", "", "", "sum"]
    assert fused.attributes["epsilon"].as_float() == 0.5
    assert list(product.inputs) == [fused.outputs[0], fused.outputs[3]]
    assert [value.name for value in model.graph.outputs] == ["normed", "result"]


def test_a_norm_of_fewer_dimensions_is_left_alone() -> None:
    model = parse(RESIDUAL.replace("[1,W,4]", "[W,4]"))
    assert not FuseSkipNorm()(model).modified
    assert node_types(model) == ["Add", "RMSNormalization", "Mul"]
