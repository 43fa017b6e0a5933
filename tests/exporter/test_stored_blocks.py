"""Blocks that a checkpoint has already: read as they are, kept in the bundle, and multiplied with exactly."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest
import torch
from tokenizers import Tokenizer, models

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import CheckpointError
from dspark_edge.engines.manifest import Quantization
from dspark_edge.exporter.checkpoint import open_checkpoint
from dspark_edge.exporter.export import ExportOptions, export_bundle
from dspark_edge.exporter.gguf_blocks import block_form, read_blocks
from dspark_edge.exporter.parity import compare_bundle
from dspark_edge.exporter.quantization import (
    BlockFormat,
    BlockSource,
    DequantizedSource,
    LastMatrix,
    dequantize_rows,
    keep_blocks,
    offset_columns,
)
from dspark_edge.exporter.stored_blocks import BlockForm, StoredBlocks
from dspark_edge.exporter.weights import RowsSource, WeightSource

from .gguf_files import LAYERS, SIZES, VOCAB, llama_model, weights_of, write

Kind = gguf.GGMLQuantizationType
FOUR, EIGHT = BlockFormat(4, 32, kept=True), BlockFormat(8, 32, kept=True)
OFFSET, CENTRED = BlockForm(4, 32, centred=False), BlockForm(4, 32, centred=True)


# What a file holds


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q8_0"])
def test_blocks_are_what_the_gguf_package_reads(kind: str) -> None:
    """Any bytes, but for the floats among them: scales and offsets of both signs, and none."""
    rng = np.random.default_rng(3)
    weights, size = gguf.GGML_QUANT_SIZES[Kind[kind]]
    data = rng.integers(0, 256, (5, 2, size)).astype(np.uint8)
    floats = 2 if kind in ("Q4_1", "Q4_K") else 1
    values = rng.normal(size=(5, 2, floats)).astype("<f2")
    values[1, 0] = 0
    data[..., : 2 * floats] = values.view(np.uint8)
    data = data.reshape(5, -1)
    blocks = read_blocks(kind, data, (5, 2 * weights))
    form = block_form(kind)
    assert form is not None and blocks.scales.shape == (5, 2 * weights // form.block_size)
    assert blocks.numbers.max() < 2**form.bits
    np.testing.assert_array_equal(blocks.values(), gguf.dequantize(data, Kind[kind]))
    if form.centred:
        np.testing.assert_array_equal(blocks.offsets, -(2.0 ** (form.bits - 1)) * blocks.scales)
    np.testing.assert_array_equal(blocks.rows(np.array([3, 1])).values(), blocks.values()[[3, 1]])


def test_other_types_have_no_such_blocks(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    types = {name: Kind.Q5_0, "model.layers.1.mlp.up_proj.weight": Kind.Q4_0}
    with open_checkpoint(write(tmp_path / "m.gguf", weights_of(llama_model()), types=types)) as checkpoint:
        assert checkpoint.block_form(name) is None
        assert checkpoint.block_form("model.layers.1.mlp.up_proj.weight") == CENTRED
        with pytest.raises(CheckpointError, match=r"up_proj\.weight' is of type Q5_0, which has no such blocks"):
            checkpoint.blocks(name)


def test_rows_are_in_the_order_of_the_weights(tmp_path: Path) -> None:
    """llama.cpp reorders the rows of queries and keys."""
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    types = dict.fromkeys(names, Kind.Q4_1)
    with open_checkpoint(write(tmp_path / "m.gguf", weights_of(llama_model()), types=types)) as checkpoint:
        for name in names:
            np.testing.assert_array_equal(checkpoint.blocks(name).values(), checkpoint.tensor(name).numpy())


def test_floats_have_no_blocks(reference_dir: Path) -> None:
    with open_checkpoint(reference_dir / "llama_target") as checkpoint:
        name = sorted(checkpoint.names())[0]
        assert checkpoint.block_form(name) is None
        with pytest.raises(CheckpointError, match="is not in blocks"):
            checkpoint.blocks(name)


# What a bundle holds


def blocks_by_hand(offsets: list[float], scale: float = 0.5) -> StoredBlocks:
    """One row, whose blocks count 0 … 15 twice."""
    numbers = np.tile(np.arange(16, dtype=np.uint8), 2 * len(offsets))[None]
    scales = np.full((1, len(offsets)), scale, np.float32)
    return StoredBlocks(numbers, scales, np.array([offsets], np.float32))


def test_an_offset_is_a_zero_point_and_what_is_missing() -> None:
    """−1.75 is −4 half steps and a quarter, 0 is none; the column's own rounding is a fifteenth of its range."""
    kept = keep_blocks(blocks_by_hand([-1.75, 0.0]), FOUR, columns=True)
    assert kept.blocks.shape == (1, 3, 16) and kept.scales.shape == (1, 3) and kept.zero_points.shape == (1, 2)
    assert kept.blocks[0, 0, :8].tolist() == [low + 16 * (low + 1) for low in range(0, 16, 2)]
    assert kept.scales[0, :2].tolist() == [0.5, 0.5] and kept.zero_points[0, 0] == 4  # of the second block: 0
    missing = dequantize_rows(kept, FOUR, 64) - blocks_by_hand([-1.75, 0.0]).values()
    assert np.abs(missing).max() <= 1e-6
    whole = keep_blocks(blocks_by_hand([-2.0, 0.0]), FOUR, columns=False)
    assert whole.blocks.shape == (1, 2, 16) and whole.zero_points.tolist() == [[4]]
    np.testing.assert_array_equal(dequantize_rows(whole, FOUR, 64), blocks_by_hand([-2.0, 0.0]).values())


def test_offsets_beyond_any_zero_point() -> None:
    """Blocks of one sign: the column has the rest, however much it is."""
    stored = blocks_by_hand([3.0, -20.0, 0.25, -3.75])
    kept = keep_blocks(stored, FOUR, columns=True)
    step = (3.0 + 12.5) / 15
    assert np.abs(dequantize_rows(kept, FOUR, 128) - stored.values()).max() <= step / 2 + 1e-5


@pytest.mark.parametrize("offset", [0.75, -0.75, 0.0])
def test_a_block_without_a_scale_is_its_offset(offset: float) -> None:
    stored = replace(blocks_by_hand([offset], scale=0.0))
    for columns in (True, False):
        kept = keep_blocks(stored, FOUR, columns)
        np.testing.assert_allclose(dequantize_rows(kept, FOUR, 32), np.full((1, 32), offset), atol=1e-7)


def test_many_blocks_stay_within_a_thirtieth_of_a_step() -> None:
    rng = np.random.default_rng(0)
    shape = (50, 18)
    scales = rng.uniform(0.5, 1.5, shape).astype(np.float32)
    stored = StoredBlocks(
        rng.integers(0, 16, (50, 18 * 32)).astype(np.uint8), scales, (-scales * rng.uniform(1, 14, shape)).astype("f4")
    )
    kept = keep_blocks(stored, FOUR, columns=True)
    errors = np.abs(dequantize_rows(kept, FOUR, 18 * 32) - stored.values())
    assert errors.max() <= 1.5 / 30 * 1.001  # a column's range is a step of the largest scale at most
    assert 0 < errors.mean() < 0.02


# Matrices that are joined of several tensors


@dataclass
class Stored:
    """A checkpoint of matrices, some of them in blocks."""

    tensors: dict[str, StoredBlocks | torch.Tensor]
    forms: dict[str, BlockForm] = field(default_factory=dict)
    source: str = "a test"

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensor(name).shape)

    def tensor(self, name: str) -> torch.Tensor:
        one = self.tensors[name]
        return one if isinstance(one, torch.Tensor) else torch.from_numpy(one.values())

    def block_form(self, name: str) -> BlockForm | None:
        return self.forms.get(name)

    def blocks(self, name: str) -> StoredBlocks:
        one = self.tensors[name]
        assert isinstance(one, StoredBlocks)
        return one


def test_kept_rows_stand_beside_rounded_ones() -> None:
    """A tensor of floats, or of other blocks, is rounded; its offset columns are zero."""
    floats = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    checkpoint = Stored({"q": blocks_by_hand([-1.75, 0.1]), "v": floats}, {"q": OFFSET})
    joined = WeightSource(checkpoint, ("q", "v"), transpose=True)  # type: ignore[arg-type]
    assert offset_columns(joined, FOUR) == 2 and offset_columns(joined, replace(FOUR, kept=False)) == 0
    last = LastMatrix()
    parts = {part: BlockSource(joined, FOUR, part, last) for part in ("blocks", "scales", "zero_points")}  # type: ignore[arg-type]
    kinds = {"blocks": torch.uint8, "scales": torch.float32, "zero_points": torch.uint8}
    for name, part in parts.items():
        assert tuple(part.load(kinds[name]).shape) == part.shape(), name
    assert parts["blocks"].shape() == (4, 3, 16)
    values = DequantizedSource(joined, FOUR).load(torch.float32).t()
    np.testing.assert_allclose(values[:1], checkpoint.tensor("q"), atol=5e-3)
    rounded = DequantizedSource(replace(joined, names=("v",)), replace(FOUR, kept=False)).load(torch.float32).t()
    assert torch.equal(values[1:], rounded)


def test_centred_blocks_need_no_columns() -> None:
    checkpoint = Stored({"q": blocks_by_hand([-4.0, -4.0])}, {"q": CENTRED})
    source = WeightSource(checkpoint, ("q",))  # type: ignore[arg-type]
    assert offset_columns(source, FOUR) == 0
    assert torch.equal(DequantizedSource(source, FOUR).load(torch.float32), checkpoint.tensor("q"))
    for other in (EIGHT, replace(FOUR, block_size=16), replace(FOUR, kept=False)):
        assert not torch.equal(DequantizedSource(source, other).load(torch.float32), torch.zeros(1, 64))
        assert offset_columns(source, other) == 0


def test_rows_of_a_head_in_blocks() -> None:
    """A draft vocabulary's: the blocks of these rows, and equal to another of the same head."""
    rng = np.random.default_rng(0)
    scales = rng.uniform(0.5, 1, (6, 2)).astype(np.float32)
    head = StoredBlocks(rng.integers(0, 256, (6, 64)).astype(np.uint8), scales, -128 * scales)
    checkpoint = Stored({"head": head}, {"head": BlockForm(8, 32, centred=True)})
    whole = WeightSource(checkpoint, ("head",))  # type: ignore[arg-type]
    rows = RowsSource(whole, "draft vocabulary", 2, lambda: torch.tensor([1, 4]))
    assert rows == RowsSource(whole, "draft vocabulary", 2, lambda: torch.tensor([1, 4])) and rows.shape() == (2, 64)
    expected = checkpoint.tensor("head")[[1, 4]]
    assert torch.equal(rows.load(torch.float32), expected)
    torch.testing.assert_close(DequantizedSource(rows, EIGHT).load(torch.float32), expected)


def test_scales_that_are_not_finite() -> None:
    damaged = replace(blocks_by_hand([0.0, 1.0]), offsets=np.array([[0.0, np.nan]], np.float32))
    source = WeightSource(Stored({"q": damaged}, {"q": OFFSET}), ("q",))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="a test: q holds values that are not finite"):
        DequantizedSource(source, FOUR).load(torch.float32)


# Bundles


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A tokenizer."""
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0")).save(str(path))
    return path


def quantized_file(path: Path, kind: Kind, **changes: object) -> Path:
    sizes = {**SIZES, "hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
    weights = weights_of(llama_model(initializer_range=0.2, **{**sizes, **changes}))
    types = {name: kind for name in weights if "_proj" in name} | {"model.embed_tokens.weight": Kind.Q8_0}
    return write(path, weights, types=types, sizes=sizes)


@pytest.mark.parametrize("lowering", ["ort", "onnx"])
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1])
def test_a_bundle_multiplies_with_the_weights_of_the_file(
    kind: Kind, lowering: str, tmp_path: Path, words: Path
) -> None:
    """The bundle's logits are those of the checkpoint; rounded a second time they are not."""
    target = quantized_file(tmp_path / "m.gguf", kind, tie_word_embeddings=True)
    shifts = {}
    for keep in (True, False):
        options = ExportOptions(
            lowering=lowering, precision="int4", accuracy_level=1, weight_block_size=32, capacity=64, keep_blocks=keep
        )
        bundle = export_bundle(target, "ngram", tmp_path / f"bundle-{keep}", options, tokenizer=words)
        assert bundle.manifest.quantization == Quantization(32, 8, 1, keep)
        report = compare_bundle(Bundle.open(bundle.path), target, "ngram", positions=24)
        assert all(row.passed for row in report.rows), report.to_json()
        assert report.quantization is not None
        shifts[keep] = report.quantization.divergence
        graph = onnx.load(bundle.graph_path("target"), load_external_data=False).graph
        sums = [node for node in graph.node if node.op_type == "ReduceSum"]
        assert len(sums) == (4 * LAYERS if keep and kind == Kind.Q4_1 else 0)
    assert shifts[True] < 3e-4 and shifts[False] > 10 * shifts[True], shifts


def test_a_manifest_says_so_only_where_blocks_are_kept(reference_dir: Path, tmp_path: Path, words: Path) -> None:
    """A checkpoint of floats, blocks of another size, and a precision of other bits."""
    file = quantized_file(tmp_path / "m.gguf", Kind.Q4_0, tie_word_embeddings=True)
    cases = {
        "floats": (reference_dir / "llama_target", "int4", None),
        "sixteen": (file, "int4", 16),
        "eight": (file, "int8", 32),  # the embedding's
    }
    kept = {}
    for name, (target, precision, size) in cases.items():
        options = ExportOptions(precision=precision, weight_block_size=size, capacity=64)
        bundle = export_bundle(target, "ngram", tmp_path / name, options, tokenizer=words)
        text = (bundle.path / "manifest.json").read_text()
        kept[name] = "kept_blocks" in text
        assert bundle.manifest.quantization is not None and bundle.manifest.quantization.kept_blocks == kept[name]
    assert kept == {"floats": False, "sixteen": False, "eight": True}
