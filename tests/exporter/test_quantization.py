"""Low-bit weights: blocks and back, the graph rewrite, and bundles that decode with them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import BundleError, CheckpointError, InvalidInputError
from dspark_edge.engines.manifest import Quantization
from dspark_edge.exporter.checkpoint import SafetensorsCheckpoint
from dspark_edge.exporter.cli import parity
from dspark_edge.exporter.configuration import read_decoder_config
from dspark_edge.exporter.export import ExportOptions, export_bundle
from dspark_edge.exporter.parity import compare_bundle
from dspark_edge.exporter.parity_report import LogitComparison, LogitShift, TextReport
from dspark_edge.exporter.quantization import (
    BlockFormat,
    BlockSource,
    DequantizedSource,
    LastMatrix,
    WeightFormats,
    dequantize_rows,
    quantize_rows,
    weight_formats,
)
from dspark_edge.exporter.signed_rounding import pack_int4, round_signed
from dspark_edge.exporter.text_parity import compare_on_text, tokenize_file
from dspark_edge.exporter.weight_rewrites import DequantizeWeights, QuantizeWeights
from dspark_edge.exporter.weights import ComputedSource
from dspark_edge.runtime import Generator, SamplingParams

Checkpoint = Callable[..., Path]


# Blocks


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_by_hand(bits: int) -> None:
    """Its range in 2^bits − 1 steps; the first of two numbers lies in a byte's lower half."""
    top = 2**bits - 1
    row = np.zeros((1, 16), np.float32)
    row[0, :3] = (top - 2) / 4, -0.5, 0.25  # scale 1/4, zero point 2
    layout = BlockFormat(4 if bits == 4 else 8, 16)
    quantized = quantize_rows(row, layout)
    assert quantized.scales.tolist() == [[0.25]] and (quantized.zero_points & 15).tolist() == [[2]]
    numbers = [top, 0, 3, *[2] * 13]
    packed = numbers if bits == 8 else [low + 16 * high for low, high in zip(numbers[::2], numbers[1::2], strict=True)]
    assert quantized.blocks.tolist() == [[packed]]
    np.testing.assert_array_equal(dequantize_rows(quantized, layout, 16), row)


@pytest.mark.parametrize("size", [96, 100, 32, 7])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_weight_is_within_half_a_step(bits: Any, block_size: int, size: int) -> None:
    layout = BlockFormat(bits, block_size)
    rows = np.random.default_rng(size).normal(size=(11, size)).astype(np.float32)
    rows[3] = 0.0
    rows[4] = np.linspace(5, 6, size)  # far from zero, all of one sign
    quantized = quantize_rows(rows, layout)
    back = dequantize_rows(quantized, layout, size)
    steps = np.repeat(quantized.scales, block_size, axis=1)[:, :size]
    assert (np.abs(back - rows) <= 0.5001 * steps).all()
    assert not back[3].any()
    assert (steps[0] <= (rows[0].max() - rows[0].min()) / (2**bits - 1) * 1.0001).all()


def test_rows_of_a_quantized_matrix_are_the_quantized_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a draft vocabulary's head is rows of the target's, and the piece size decides nothing."""
    layout = BlockFormat(4, 32)
    rows = np.random.default_rng(0).normal(size=(40, 96)).astype(np.float32)
    whole = quantize_rows(rows, layout)
    chosen = np.array([1, 5, 39])
    monkeypatch.setattr("dspark_edge.exporter.quantization._PIECE", 7)
    for other, index in ((quantize_rows(rows, layout), slice(None)), (quantize_rows(rows[chosen], layout), chosen)):
        for name in ("blocks", "scales", "zero_points"):
            np.testing.assert_array_equal(getattr(other, name), getattr(whole, name)[index])
    values = dequantize_rows(whole, layout, 96)
    np.testing.assert_array_equal(dequantize_rows(quantize_rows(rows[chosen], layout), layout, 96), values[chosen])


def test_parts_are_read_once_in_turn_and_right_in_any_order() -> None:
    reads = []

    def compute() -> torch.Tensor:
        reads.append(1)
        return torch.arange(64.0).reshape(2, 32)

    matrix, layout, last = ComputedSource("matrix", compute, (2, 32)), BlockFormat(8, 16), LastMatrix()
    parts = {name: BlockSource(matrix, layout, name, last) for name in ("blocks", "scales", "zero_points")}  # type: ignore[arg-type]
    kinds = {"blocks": torch.uint8, "scales": torch.float32, "zero_points": torch.uint8}
    first = {name: part.load(kinds[name]) for name, part in parts.items()}
    assert len(reads) == 1
    for name in ("zero_points", "blocks", "scales"):
        assert torch.equal(parts[name].load(kinds[name]), first[name])
        assert parts[name].shape() == tuple(first[name].shape)
    other = BlockSource(ComputedSource("other", lambda: torch.ones(2, 32), (2, 32)), layout, "scales", last)
    other.load(torch.float32)
    assert torch.equal(parts["scales"].load(torch.float32), first["scales"])
    dequantized = DequantizedSource(matrix, layout).load(torch.float32)
    assert (dequantized - compute()).abs().max() <= 0.5001 * first["scales"].max()


def test_signed_blocks_by_hand() -> None:
    """−7 … 7 times the scale where the largest is worth it, and a clipped one where all others are better off."""
    row = np.zeros((1, 32), np.float32)
    row[0, :15] = np.arange(-7, 8) / 4
    row[0, 16] = 1e-9  # below any float16 scale: a block of zeros, whose scale is positive all the same
    rounded = round_signed(row, 16)
    assert rounded.scales.dtype == np.float16 and rounded.scales.tolist() == [[0.25, 2.0**-24]]
    assert rounded.numbers[0, :15].tolist() == list(range(-7, 8)) and not rounded.numbers[0, 15:].any()
    assert rounded.values()[0, :16].tolist() == row[0, :16].tolist()
    # At 3.2 / 7 the fifteen of 0.36 would be 0.457. At 0.95 of that they are 0.434, for 0.16 less of the largest.
    clipped = round_signed(np.array([[3.2, *[0.36] * 15]], np.float32), 16)
    assert clipped.numbers.tolist() == [[7, *[1] * 15]]
    assert clipped.scales[0, 0] == np.float16(0.95 * 3.2 / 7)


def test_signed_blocks_are_rounded_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 64)).astype(np.float32)
    whole = round_signed(rows, 32)
    monkeypatch.setattr("dspark_edge.exporter.signed_rounding._PIECE", 7)
    again = round_signed(rows, 32)
    np.testing.assert_array_equal(again.numbers, whole.numbers)
    np.testing.assert_array_equal(again.scales, whole.scales)
    errors = np.square(whole.values() - rows).reshape(20, 2, 32).sum(axis=-1)
    blocks = rows.reshape(20, 2, 32)
    scales = (np.abs(blocks).max(axis=-1, keepdims=True) / 7).astype(np.float16).astype(np.float32)
    unclipped = np.square(np.rint(blocks / scales) * scales - blocks).sum(axis=-1)
    assert (errors <= unclipped * (1 + 1e-5)).all() and errors.sum() < 0.95 * unclipped.sum()
    with pytest.raises(RuntimeError, match="rows of 64 are not whole blocks of 48"):
        round_signed(rows, 48)


def test_signed_parts_lie_as_the_product_wants_them() -> None:
    rows = torch.arange(-24.0, 24).reshape(3, 16)  # two of them have 24, the largest, at an end
    layout = BlockFormat(4, 16, signed=True)
    rounded, last = round_signed(rows.numpy(), 16), LastMatrix()
    plain = ComputedSource("rows", lambda: rows, (3, 16))
    numbers = BlockSource(plain, layout, "numbers", last)
    assert numbers.shape() == (3, 16)
    packed = numbers.load(torch.uint8)
    assert torch.equal(packed, pack_int4(torch.from_numpy(rounded.numbers)))
    unpacked = torch.stack((packed & 15, packed >> 4), dim=-1).reshape(3, 16).to(torch.int8)
    assert torch.equal(torch.where(unpacked > 7, unpacked - 16, unpacked), torch.from_numpy(rounded.numbers))
    assert pack_int4(torch.tensor([-8, 7, -1], dtype=torch.int8)).tolist() == [0x78, 0x0F]
    dequantized = DequantizedSource(plain, layout).load(torch.float32)
    assert torch.equal(dequantized, torch.from_numpy(rounded.values()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    source = ComputedSource("matrix", lambda: torch.tensor([[value] + [0.0] * 31]), (1, 32))
    with pytest.raises(CheckpointError, match="not finite"):
        BlockSource(source, BlockFormat(4, 32), "blocks", LastMatrix()).load(torch.uint8)


# The rewrite

GRAPH = """
<ir_version: 10, opset_import: ["" : 23]>
agraph (float[1,W,32] x, float[N,32] rows, int64[1,W] ids)
    => (float[1,W,8] projected, float[N,40] logits, float[1,W,32] embedded, float[1,W,32] kept) {
    projected = MatMul(x, WEIGHT)
    logits = Gemm <transB = 1, alpha = 1.0, beta = 1.0> (rows, TABLE)
    embedded = Gather <axis = 0> (TABLE, ids)
    kept = MatMul(x, OTHER)
}
"""


def small_graph(embedding: str = "embed_tokens.weight") -> ir.Model:
    model = ir.from_onnx_text(GRAPH.replace("WEIGHT", "weight").replace("TABLE", "table").replace("OTHER", "other"))
    shapes = {"weight": (32, 8), "table": (40, 32), "other": (32, 32)}
    names = {"weight": "layers.0.self_attn.o_proj.weight", "table": embedding, "other": "context.fc.weight"}
    found = {value.name: value for node in model.graph for value in node.inputs if value is not None}
    for name, shape in shapes.items():
        value = found[name]
        value.name, value.shape, value.type = names[name], ir.Shape(shape), ir.TensorType(ir.DataType.FLOAT)
        model.graph.initializers[names[name]] = value
    return model


def test_products_and_look_ups_take_blocks() -> None:
    model = small_graph()
    rewrite = QuantizeWeights(WeightFormats(BlockFormat(4, 16), BlockFormat(8, 16)), 4)
    assert rewrite(model).modified
    projected, logits, embedded, kept = model.graph
    assert [node.op_type for node in model.graph] == ["MatMulNBits", "MatMulNBits", "GatherBlockQuantized", "MatMul"]
    assert [value.name for value in projected.inputs if value is not None] == [
        "x",
        *(f"layers.0.self_attn.o_proj.weight.{part}" for part in ("blocks", "scales", "zero_points")),
    ]
    assert {name: entry.value for name, entry in logits.attributes.items()} == {
        "K": 32,
        "N": 40,
        "bits": 8,
        "block_size": 16,
        "accuracy_level": 4,
    }
    assert [value.name for value in embedded.inputs if value is not None] == [
        "embed_tokens.weight.rows",
        "ids",
        "embed_tokens.weight.scales",
        "embed_tokens.weight.zero_points",
    ]
    shapes = {name: tuple(value.shape or ()) for name, value in model.graph.initializers.items()}
    assert shapes == {
        "context.fc.weight": (32, 32),
        "layers.0.self_attn.o_proj.weight.blocks": (8, 2, 8),
        "layers.0.self_attn.o_proj.weight.scales": (8, 2),
        "layers.0.self_attn.o_proj.weight.zero_points": (8, 1),
        "embed_tokens.weight.blocks": (40, 2, 16),
        "embed_tokens.weight.rows": (40, 32),
        "embed_tokens.weight.scales": (40, 2),
        "embed_tokens.weight.zero_points": (40, 2),
    }
    assert [value.name for value in model.graph.outputs] == ["projected", "logits", "embedded", "kept"]
    assert kept.inputs[1] is not None and kept.inputs[1].name == "context.fc.weight"
    assert rewrite.parts["embed_tokens.weight.rows"] == ("embed_tokens.weight", "blocks")
    assert not rewrite(model).modified


def test_products_take_signed_numbers() -> None:
    """Embedding and head stay as they are, and the operator is ONNX's own."""
    model = small_graph()
    for value in model.graph.initializers.values():
        value.type = ir.TensorType(ir.DataType.FLOAT16)
    rewrite = DequantizeWeights(WeightFormats(BlockFormat(4, 16, signed=True), None))
    assert rewrite(model).modified
    assert [node.op_type for node in model.graph] == ["DequantizeLinear", "MatMul", "Gemm", "Gather", "MatMul"]
    values, projected = model.graph[0], model.graph[1]
    assert values.domain == "" and list(model.opset_imports) == [""]
    assert {name: entry.value for name, entry in values.attributes.items()} == {"axis": 0, "block_size": 16}
    assert projected.inputs[1] is values.outputs[0] and values.outputs[0].dtype == ir.DataType.FLOAT16
    parts = {
        name: (value.dtype, tuple(value.shape or ()))
        for name, value in model.graph.initializers.items()
        if "o_proj" in name
    }
    assert parts == {
        "layers.0.self_attn.o_proj.weight.numbers": (ir.DataType.INT4, (32, 8)),
        "layers.0.self_attn.o_proj.weight.scales": (ir.DataType.FLOAT16, (2, 8)),
    }
    assert not rewrite(model).modified


def test_what_has_no_form_for_signed_numbers_is_an_error() -> None:
    model = small_graph()
    with pytest.raises(RuntimeError, match=r"o_proj\.weight is FLOAT, but scales of signed blocks are float16"):
        DequantizeWeights(WeightFormats(BlockFormat(4, 16, signed=True), None))(model)
    with pytest.raises(RuntimeError, match="rows of 32 are not whole blocks of 64"):
        DequantizeWeights(WeightFormats(BlockFormat(4, 64, signed=True), None))(small_graph())
    with pytest.raises(RuntimeError, match=r"embed_tokens\.weight is used by Gemm"):
        everything = BlockFormat(4, 16, signed=True)
        half = small_graph()
        for value in half.graph.initializers.values():
            value.type = ir.TensorType(ir.DataType.FLOAT16)
        DequantizeWeights(WeightFormats(everything, everything))(half)


def test_what_has_no_form_for_blocks_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="rows of 32 are not whole blocks of 64"):
        QuantizeWeights(WeightFormats(BlockFormat(4, 64), BlockFormat(4, 64)), 4)(small_graph())
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 23]>\nagraph (float[8] x) => (float[8] y)\n'
        "<float[8] weight = {0,0,0,0,0,0,0,0}> { y = Add(x, weight) }"
    )
    value = model.graph.initializers.pop("weight")
    value.name = "lm_head.weight"
    model.graph.initializers["lm_head.weight"] = value
    with pytest.raises(RuntimeError, match=r"lm_head\.weight is used by Add"):
        QuantizeWeights(WeightFormats(BlockFormat(4, 16), BlockFormat(8, 16)), 4)(model)


def test_which_parameters_are_quantized() -> None:
    formats = WeightFormats(BlockFormat(4, 32), BlockFormat(8, 32))
    for name in ("layers.3.mlp.down_proj.weight", "layers.0.self_attn.qkv_proj.weight", "context.kv_proj.weight"):
        assert formats.of(name) == BlockFormat(4, 32)
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert formats.of(name) == BlockFormat(8, 32)
    kept = (
        "norm.weight",
        "context.fc.weight",
        "markov_head.markov_w2.weight",
        "markov_head.gate_proj.weight",
        "markov_head.joint_proj.weight",
        "confidence_head.weight",
        "layers.0.self_attn.qkv_proj.bias",
        "rotary.cos",
    )
    assert not any(map(formats.of, kept))


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4", "lowering": "decomposed"}, "choose the lowering 'ort' or 'onnx', or the precision fp32"),
        ({"accuracy_level": 4}, "accuracy_level is given, but fp32 weights have none; choose .* int8 or int4"),
        ({"precision": "fp16", "weight_block_size": 32}, "weight_block_size is given, but fp16"),
        ({"precision": "int8", "weight_block_size": 48}, "weight_block_size is 48, expected one of: 16, 32, 64, 128"),
        ({"precision": "int8", "vocabulary_bits": 4}, "vocabulary_bits is 4, but the other weights are int8"),
        ({"precision": "int4", "vocabulary_bits": 6}, "vocabulary_bits is 6, expected one of: 4, 8"),
        ({"precision": "int8", "accuracy_level": 2}, "accuracy_level is 2, expected one of: 1, 4"),
        (
            {"precision": "w4a16"},
            "the 'ort' lowering has no operators for w4a16 weights; choose the lowering 'onnx', or",
        ),
        ({"precision": "w4a16", "lowering": "decomposed"}, "the 'decomposed' lowering has no operators for w4a16"),
        ({"precision": "w4a16", "lowering": "onnx", "accuracy_level": 1}, "accuracy_level is given, but w4a16"),
        ({"precision": "w4a16", "lowering": "onnx", "vocabulary_bits": 8}, "vocabulary_bits is given, but w4a16"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ExportOptions(**options)


@pytest.mark.parametrize(
    ("bits", "hidden_size", "wanted", "expected"),
    [
        (4, 576, None, 32),
        (4, 576, 16, 16),
        (4, 96, None, 16),  # three blocks of 32 are an odd number
        (8, 96, None, 32),
        (8, 48, None, 16),
        (4, 576, 64, "rows of 576, .* even number of whole blocks of 4 bits; choose one of: 16, 32$"),
        (8, 576, 128, "rows of 576, .* whole blocks of 8 bits; choose one of: 16, 32, 64$"),
        (8, 40, None, "weight_block_size is 32, .*; choose the precision fp32"),
    ],
)
def test_block_sizes_fit_the_hidden_size(
    bits: int, hidden_size: int, wanted: int | None, expected: int | str, reference_dir: Path
) -> None:
    given = json.loads((reference_dir / "llama_target" / "config.json").read_text())
    config = dataclasses.replace(read_decoder_config(given, "a test"), hidden_size=hidden_size)
    options = ExportOptions(precision="int4", weight_block_size=wanted, vocabulary_bits=bits)
    if isinstance(expected, int):
        assert options.resolve_quantization(config) == Quantization(expected, bits, 4)
        return
    with pytest.raises(InvalidInputError, match=expected):
        options.resolve_quantization(config)


@pytest.mark.parametrize(("hidden_size", "expected"), [(576, 64), (96, 32), (48, 16)])
def test_eight_bits_have_larger_blocks(hidden_size: int, expected: int, reference_dir: Path) -> None:
    given = json.loads((reference_dir / "llama_target" / "config.json").read_text())
    config = dataclasses.replace(read_decoder_config(given, "a test"), hidden_size=hidden_size)
    assert ExportOptions(precision="int8").resolve_quantization(config) == Quantization(expected, 8, 4)


def test_a_block_size_that_does_not_fit_leaves_nothing(reference_dir: Path, tmp_path: Path) -> None:
    options = ExportOptions(precision="int4", weight_block_size=64)
    with pytest.raises(InvalidInputError, match=r"rows of 96, the hidden size, .*; choose one of: 16, 32"):
        export_bundle(reference_dir / "qwen3_target", "ngram", tmp_path / "bundle", options)
    assert not list(tmp_path.iterdir())


def test_signed_blocks_are_whole_in_every_projection(make_target: Checkpoint, tmp_path: Path) -> None:
    """Hidden size 32 and intermediate size 48: 16 fits both, and 64 is wanted."""
    folder = make_target(tmp_path / "target")
    config = read_decoder_config(json.loads((folder / "config.json").read_text()), "target")
    half = ExportOptions(lowering="onnx", precision="w4a16")
    assert half.resolve_quantization(config) == Quantization(16, 16)
    with pytest.raises(InvalidInputError, match=r"weight_block_size is 32, .* whole blocks; choose one of: 16"):
        dataclasses.replace(half, weight_block_size=32).resolve_quantization(config)
    odd = dataclasses.replace(config, intermediate_size=50)
    with pytest.raises(InvalidInputError, match=r"rows of .*50.* whole blocks; choose the precision fp16"):
        half.resolve_quantization(odd)


def test_a_manifest_that_does_not_say_how() -> None:
    assert weight_formats("fp32", None) is None
    assert weight_formats("int4", Quantization(64, 8, 1)) == WeightFormats(BlockFormat(4, 64), BlockFormat(8, 64))
    with pytest.raises(BundleError, match="int4, but its manifest lacks 'quantization'"):
        weight_formats("int4", None)


# Bundles


@pytest.fixture(scope="session")
def quantized_bundle(export_once: Callable[..., Path], reference_dir: Path) -> Callable[..., Path]:
    """`quantized_bundle(target, drafter, precision, lowering="ort", accuracy_level=4)`: a reference pair's bundle."""

    def bundle(target: str, drafter: str, precision: str, lowering: str = "ort", accuracy_level: int = 4) -> Path:
        name = f"{target}-{drafter}-{lowering}-{precision}-{accuracy_level}"
        options = {"lowering": lowering, "precision": precision, "accuracy_level": accuracy_level}
        return export_once(name, reference_dir / target, reference_dir / drafter, capacity=256, **options)

    return bundle


QuantizedBundle = Callable[..., Path]


@pytest.mark.parametrize(
    ("target", "drafter", "precision"),
    [
        ("qwen3_target", "qwen3_rnn", "int8"),
        ("qwen3_target", "qwen3_rnn", "int4"),
        ("llama_target", "llama_vanilla", "int4"),
    ],
)
def test_speculative_tokens_are_the_plain_ones(
    target: str, drafter: str, precision: str, quantized_bundle: QuantizedBundle
) -> None:
    prompts = [[1, 5, 9, 200, 31], [7], list(range(40, 60))]
    settings = SamplingParams(max_new_tokens=24, ignore_eos=True)
    answers: dict[str, list[list[int]]] = {}
    for mode in ("plain", "static"):
        with Generator.open(quantized_bundle(target, drafter, precision), mode=mode, threads=1) as generator:
            answers[mode] = [list(generator.generate(prompt, settings).token_ids) for prompt in prompts]
    assert answers["static"] == answers["plain"]
    assert {len(ids) for ids in answers["plain"]} == {24}


@pytest.mark.parametrize(("precision", "lowering"), [("int8", "ort"), ("int4", "onnx")])
def test_graphs_compute_what_the_blocks_say(
    precision: str, lowering: str, quantized_bundle: QuantizedBundle, reference_dir: Path
) -> None:
    """With fp32 activations a quantised graph is as exact as any other; what rounding changes is reported apart."""
    target, drafter = reference_dir / "qwen3_target", reference_dir / "qwen3_rnn"
    report = compare_bundle(quantized_bundle("qwen3_target", "qwen3_rnn", precision, lowering, 1), target, drafter)
    assert report.passed, report.to_json()
    assert {row.tolerance for row in report.rows if row.name == "logits"} == {1e-4}
    shift = report.quantization
    assert shift is not None and shift.positions == 54
    assert shift.top1_agreement >= {"int8": 0.9, "int4": 0.6}[precision]
    assert 0 < shift.divergence <= {"int8": 1e-3, "int4": 2e-1}[precision]
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["quantization"]["top1_agreement"] == shift.top1_agreement


@pytest.fixture(scope="session")
def half_bundle(export_once: Callable[..., Path], reference_dir: Path) -> Path:
    """A reference pair with projections of 4 bits behind DequantizeLinear, all else in half precision."""
    options = {"lowering": "onnx", "precision": "w4a16", "capacity": 128, "weight_block_size": 16}
    pair = reference_dir / "qwen3_target", reference_dir / "qwen3_rnn"
    return export_once("qwen3-w4a16", *pair, **options)


def test_signed_blocks_in_half_precision(half_bundle: Path, reference_dir: Path) -> None:
    """They are standard operators, compute what the blocks say, and drafts change no token."""
    bundle = Bundle.open(half_bundle)
    assert bundle.manifest.quantization == Quantization(16, 16) and set(bundle.manifest.opsets) == {""}
    report = compare_bundle(half_bundle, reference_dir / "qwen3_target", reference_dir / "qwen3_rnn")
    assert report.passed, report.to_json()
    assert {row.tolerance for row in report.rows if row.name == "logits"} == {2e-2}
    assert report.quantization is not None and report.quantization.top1_agreement >= 0.6
    model = onnx.load(bundle.graph_path("target"), load_external_data=False)
    kinds = {
        tensor.name.rsplit(".", 1)[1]: tensor.data_type for tensor in model.graph.initializer if "_proj" in tensor.name
    }
    assert kinds["numbers"] == onnx.TensorProto.INT4 and kinds["scales"] == onnx.TensorProto.FLOAT16
    settings = SamplingParams(max_new_tokens=16, ignore_eos=True)
    answers = {}
    for mode in ("plain", "static"):
        with Generator.open(half_bundle, mode=mode, threads=1) as generator:
            answers[mode] = [generator.generate(prompt, settings).token_ids for prompt in ([1, 5, 9, 200, 31], [7])]
    assert answers["static"] == answers["plain"]


def test_int8_activations_stay_within_their_tolerance(quantized_bundle: QuantizedBundle, reference_dir: Path) -> None:
    target, drafter = reference_dir / "qwen3_target", reference_dir / "qwen3_rnn"
    report = compare_bundle(quantized_bundle("qwen3_target", "qwen3_rnn", "int8"), target, drafter)
    assert report.passed, report.to_json()
    errors = {row.name: row.max_rel_error for row in report.rows}
    assert 1e-4 < errors["logits"] <= 5e-2  # they are rounded, but not coarsely
    assert report.quantization is not None and report.quantization.top1_agreement >= 0.9


def test_a_tied_embedding_is_stored_once(quantized_bundle: QuantizedBundle) -> None:
    """Its head's blocks are the embedding's, in the target as in the drafter."""
    bundle = Bundle.open(quantized_bundle("qwen3_target", "qwen3_rnn", "int4"))
    assert bundle.manifest.precision == "int4" and bundle.manifest.quantization == Quantization(32, 8, 4)
    places = {}
    for role in ("target", "drafter"):
        model = onnx.load(bundle.graph_path(role), load_external_data=False)
        for tensor in model.graph.initializer:
            places[role, tensor.name] = {entry.key: entry.value for entry in tensor.external_data}
            kept = ("norm", "context.fc", "markov_head", "confidence_head", "rotary")
            if tensor.external_data and any(name in tensor.name for name in kept):
                assert tensor.data_type == onnx.TensorProto.FLOAT, tensor.name
        floats = [node.input[1] for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
        assert all("markov" in name or "confidence" in name or "fc" in name for name in floats)
    shared = places["target", "embed_tokens.weight.rows"]
    assert shared["location"] == "target.onnx.data"
    assert places["target", "embed_tokens.weight.blocks"] == shared
    assert places["drafter", "embed_tokens.weight.rows"] == shared
    assert places["drafter", "lm_head.weight.blocks"] == shared
    assert places["drafter", "lm_head.weight.scales"] == places["target", "embed_tokens.weight.scales"]


@pytest.mark.parametrize("draft_vocab_size", [None, 100])
def test_heads_of_their_own(
    draft_vocab_size: int | None, make_target: Checkpoint, make_drafter: Checkpoint, tmp_path: Path
) -> None:
    """Beside them: biases, and projections that end inside a block (intermediate size 48). Twice the same files."""
    options = {} if draft_vocab_size is None else {"draft_vocab_size": draft_vocab_size}
    target = make_target(tmp_path / "target", tie_word_embeddings=draft_vocab_size is not None, attention_bias=True)
    drafter = make_drafter(tmp_path / "drafter", target, **options)
    bits = {"precision": "int8"} if draft_vocab_size is None else {"precision": "int4", "vocabulary_bits": 4}
    settings = ExportOptions(accuracy_level=1, weight_block_size=16, capacity=96, **bits)
    bundle = export_bundle(target, drafter, tmp_path / "bundle", settings)
    report = compare_bundle(bundle, target, drafter)
    assert report.passed, report.to_json()
    if draft_vocab_size is not None:
        again = export_bundle(target, drafter, tmp_path / "again", settings)
        assert again.manifest.files == bundle.manifest.files


def test_a_batch_with_low_bit_weights(quantized_bundle: QuantizedBundle) -> None:
    """The `onnx` lowering takes sequences of a batch, each as if it were alone."""
    from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
    from dspark_edge.exporter.graph_runner import GraphRunner

    bundle = Bundle.open(quantized_bundle("qwen3_target", "qwen3_rnn", "int4", "onnx", 1))
    ids = np.random.default_rng(0).integers(0, 256, (2, 5))
    with OnnxRuntimeEngine(bundle, threads=1) as engine:
        together = GraphRunner(engine, 256, batch=2).extend(ids)
        for row in (0, 1):
            alone = GraphRunner(engine, 256).extend(ids[row : row + 1])
            np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


def test_weights_that_are_not_finite_or_not_all_there(reference_dir: Path, tmp_path: Path) -> None:
    target, output = tmp_path / "target", tmp_path / "bundles" / "bundle"
    target.mkdir()
    output.parent.mkdir()
    for name in ("config.json", "model.safetensors"):
        (target / name).write_bytes((reference_dir / "llama_target" / name).read_bytes())
    weights = load_file(target / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][1, 2] = float("nan")
    save_file(weights, target / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.down_proj\.weight holds values that are not finite"):
        export_bundle(target, "ngram", output, ExportOptions(precision="int4"))
    assert not list(output.parent.iterdir())

    os.truncate(target / "model.safetensors", 50_000)
    with pytest.raises(CheckpointError, match="is truncated or damaged"):
        export_bundle(target, "ngram", output, ExportOptions(precision="int4"))
    assert not list(output.parent.iterdir())


def test_a_checkpoint_that_cannot_be_read_to_its_end(
    reference_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = SafetensorsCheckpoint.tensor

    def tensor(self: SafetensorsCheckpoint, name: str) -> torch.Tensor:
        if name == "model.layers.2.mlp.up_proj.weight":
            raise CheckpointError("it ends here")
        return read(self, name)

    monkeypatch.setattr(SafetensorsCheckpoint, "tensor", tensor)
    with pytest.raises(CheckpointError, match="it ends here"):
        export_bundle(reference_dir / "llama_target", "ngram", tmp_path / "bundle", ExportOptions(precision="int4"))
    assert not list(tmp_path.iterdir())


# What is reported


def test_a_shift_by_hand() -> None:
    comparison = LogitComparison()
    expected = np.log(np.array([[0.5, 0.25, 0.25], [0.5, 0.4, 0.1]], np.float32))
    given = np.log(np.array([[0.5, 0.25, 0.25], [0.4, 0.5, 0.1]], np.float32))
    comparison.add(given[:1], expected[:1] + 3)  # a constant changes nothing
    comparison.add(given[1:], expected[1:])
    shift = comparison.result(0.75)
    divergence = 0.5 * np.log(0.5 / 0.4) + 0.4 * np.log(0.4 / 0.5)
    assert (shift.positions, shift.top1_agreement) == (2, 0.5)
    assert shift.divergence == pytest.approx(divergence / 2, abs=1e-6)
    assert shift.worst_margin == pytest.approx(np.log(0.5 / 0.4), abs=1e-6)
    assert not shift.passed and comparison.result(0.5).passed


def test_a_text_report_fails_beyond_its_tolerance() -> None:
    shift = LogitShift(10, 1.0, 0.0, 0.0)
    assert TextReport(shift, 10.2, 10.0, 0.03).passed
    assert not TextReport(shift, 10.4, 10.0, 0.03).passed
    assert not TextReport(shift, float("nan"), 10.0, 0.03).passed


def test_perplexity_of_a_text(quantized_bundle: QuantizedBundle, reference_dir: Path) -> None:
    """Windows that are no multiple of the chunks; in fp32 the perplexity is torch's own, computed in one pass."""
    ids = np.random.default_rng(1).integers(0, 256, 150).tolist()
    target, drafter = reference_dir / "qwen3_target", reference_dir / "qwen3_rnn"
    bundle = quantized_bundle("qwen3_target", "qwen3_rnn", "int8")
    report = compare_on_text(bundle, target, drafter, ids, window=100, tolerance=0.1)
    assert report.passed and report.shift.positions == 99 + 49
    assert report.perplexity == pytest.approx(report.reference_perplexity, rel=2e-2)
    assert report.perplexity != report.reference_perplexity
    assert report.reference_perplexity == pytest.approx(perplexity(target, [ids[:100], ids[100:]]), rel=1e-4)


def perplexity(target: Path, windows: list[list[int]]) -> float:
    from contextlib import ExitStack

    from dspark_edge.exporter.pair import open_pair
    from dspark_edge.exporter.weights import load_module

    losses = []
    with ExitStack() as stack, torch.no_grad():
        pair = open_pair(stack, target, "ngram")
        with torch.device("meta"):
            module = pair.build_target(128, torch.float32)
        load_module(module, pair.target_sources(128))
        config = pair.target_config
        for window in windows:
            past = [torch.zeros(1, config.num_key_value_heads, 128, config.head_dim)] * (2 * config.num_layers)
            rows = torch.arange(len(window))[None]
            logits, _, _ = module(torch.tensor([window]), torch.tensor([0]), rows, past, [])
            losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(window[1:]), reduction="none"))
    return float(torch.cat(losses).mean().exp())


@pytest.mark.parametrize("ids", [[], [3], [3, 260], [3, -1]])
def test_token_ids_that_cannot_be(ids: list[int], quantized_bundle: QuantizedBundle, reference_dir: Path) -> None:
    with pytest.raises(InvalidInputError, match="expected at least 2, below the vocabulary of 260"):
        compare_on_text(
            quantized_bundle("qwen3_target", "qwen3_rnn", "int8"),
            reference_dir / "qwen3_target",
            reference_dir / "qwen3_rnn",
            ids,
        )


def test_the_command_reads_a_text(reference_dir: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    target = str(reference_dir / "qwen3_target")
    options = ExportOptions(precision="int8", capacity=128)
    bundle = export_bundle(target, "ngram", tmp_path / "bundle", options, tokenizer=tmp_path / "tokenizer.json")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number % 250}" for number in range(300)))
    assert tokenize_file(bundle, text, 3) == [0, 1, 2]

    arguments = [str(bundle.path), "--target", target, "--drafter", "ngram", "--text", str(text), "--text-tokens", "90"]
    result = CliRunner().invoke(parity, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["text"]["positions"] == 89 and data["quantization"]["positions"] == 54
    table = CliRunner().invoke(parity, arguments)
    assert "perplexity" in table.stdout and "quantized weights against fp32" in table.stdout

    text.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidInputError, match="cannot be read as text"):
        tokenize_file(bundle, text)
    os.remove(bundle.path / "tokenizer.json")
    with pytest.raises(InvalidInputError, match=r"no tokenizer\.json"):
        tokenize_file(bundle, text)
