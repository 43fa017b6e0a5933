"""Recipes for parameters: joined, transposed, streamed once, and shared between graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import CheckpointError, MismatchError
from dspark_edge.exporter.checkpoint import open_checkpoint
from dspark_edge.exporter.configuration import RotaryConfig, read_decoder_config
from dspark_edge.exporter.pair import check_weights, open_pair
from dspark_edge.exporter.weights import WeightSource, check_shared_weights, load_module, rotary_tables

Checkpoint = Callable[..., Path]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def change(folder: Path, changes: dict[str, torch.Tensor | None]) -> None:
    """Replace tensors of a checkpoint, or remove them."""
    path = folder / "model.safetensors"
    weights = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)


def test_a_source_joins_and_transposes(tmp_path: Path, make_target: Checkpoint, stack: ExitStack) -> None:
    checkpoint = stack.enter_context(open_checkpoint(make_target(tmp_path / "target")))
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    source = WeightSource(checkpoint, tuple(names), transpose=True, origin="target")
    given = source.load(torch.float16)
    assert source.shape() == tuple(given.shape) == (32, 64 + 32 + 32)
    assert given.is_contiguous() and given.dtype == torch.float16
    assert torch.equal(given, torch.cat([checkpoint.tensor(name) for name in names]).half().t())
    uneven = WeightSource(checkpoint, (names[0], "model.layers.0.mlp.down_proj.weight"))
    with pytest.raises(CheckpointError, match="differ in shape"):
        uneven.shape()


def test_every_parameter_has_one_source(
    tmp_path: Path, make_target: Checkpoint, make_drafter: Checkpoint, stack: ExitStack
) -> None:
    target = make_target(tmp_path / "target", tie_word_embeddings=False, attention_bias=True)
    pair = open_pair(stack, target, make_drafter(tmp_path / "drafter", target, markov_head_type="rnn"))
    check_weights(pair, 32, 16, torch.float32)
    with torch.device("meta"):
        modules = pair.build_target(32, torch.float32), pair.build_drafter(32, 16, None, torch.float32)
    for module, sources in zip(modules, (pair.target_sources(32), pair.drafter_sources(32)), strict=True):
        assert dict(module.named_parameters()).keys() == sources.keys()
        loaded = load_module(module, sources)
        assert all(torch.isfinite(parameter).all() for parameter in loaded.parameters())


def test_a_drafter_that_brings_no_copies(
    tmp_path: Path, make_target: Checkpoint, make_drafter: Checkpoint, stack: ExitStack
) -> None:
    target = make_target(tmp_path / "target")
    drafter = make_drafter(tmp_path / "drafter", target)
    change(drafter, {"embed_tokens.weight": None, "lm_head.weight": None})
    check_weights(open_pair(stack, target, drafter), 32, 16, torch.float32)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("embed_tokens.weight", 1, "embed_tokens.weight differs in 1 of 260 rows"),
        ("lm_head.weight", 260, "lm_head.weight differs in 260 of 260 rows"),
    ],
)
def test_copies_that_differ(
    name: str,
    rows: int,
    message: str,
    tmp_path: Path,
    make_target: Checkpoint,
    make_drafter: Checkpoint,
    stack: ExitStack,
) -> None:
    target = make_target(tmp_path / "target")
    folder = make_drafter(tmp_path / "drafter", target)
    other = load_file(folder / "model.safetensors")[name].clone()
    other[:rows, 3] += 0.01
    change(folder, {name: other})
    with pytest.raises(MismatchError, match=message):
        check_weights(open_pair(stack, target, folder), 32, 16, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_in_another_type_may_be_rounded(
    dtype: torch.dtype, tmp_path: Path, make_target: Checkpoint, make_drafter: Checkpoint, stack: ExitStack
) -> None:
    source = make_target(tmp_path / "target")
    folder = make_drafter(tmp_path / "drafter", source)
    embedding = load_file(folder / "model.safetensors")["embed_tokens.weight"]
    change(folder, {"embed_tokens.weight": embedding.to(dtype), "lm_head.weight": embedding.to(dtype)})
    target, drafter = (stack.enter_context(open_checkpoint(path)) for path in (source, folder))
    config = read_decoder_config(target.config, "target")
    check_shared_weights(target, config, drafter)
    drafter.close()
    change(folder, {"embed_tokens.weight": (embedding * 1.05).to(dtype)})
    with pytest.raises(MismatchError, match=r"embed_tokens\.weight differs"):
        check_shared_weights(target, config, stack.enter_context(open_checkpoint(folder)))


def test_a_nan_in_a_copy_is_a_difference(
    tmp_path: Path, make_target: Checkpoint, make_drafter: Checkpoint, stack: ExitStack
) -> None:
    target = make_target(tmp_path / "target")
    folder = make_drafter(tmp_path / "drafter", target)
    broken = load_file(folder / "model.safetensors")["embed_tokens.weight"].clone()
    broken[7, 0] = float("nan")
    change(folder, {"embed_tokens.weight": broken})
    with pytest.raises(MismatchError, match="differs in 1 of 260 rows"):
        check_weights(open_pair(stack, target, folder), 32, 16, torch.float32)


def test_rotary_tables_scale_as_llama_3_does(tmp_path: Path, make_target: Checkpoint, stack: ExitStack) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    values = open_checkpoint(make_target(tmp_path / "target", rope_scaling=scaling)).config
    scaled = read_decoder_config(values, "target")
    plain = read_decoder_config({**values, "rope_scaling": None}, "target")
    assert scaled.rotary == RotaryConfig(10000.0, "llama3", 8.0, 1.0, 4.0, 64)
    angle = [torch.atan2(*reversed([table[1] for table in rotary_tables(config, 2)])) for config in (scaled, plain)]
    ratio = angle[1] / angle[0]  # per frequency: short wavelengths stay, long ones stretch by the factor
    assert ratio[0].item() == pytest.approx(1.0) and ratio[-1].item() == pytest.approx(8.0, rel=1e-3)
    assert bool((ratio[1:] >= ratio[:-1] - 1e-4).all())


def test_a_bundle_holds_each_weight_once(reference_bundle: Callable[..., Path], reference_dir: Path) -> None:
    """The drafter's graph reads embedding and head from the target's data; tied ones are one there, too."""
    bundle = Bundle.open(reference_bundle("qwen3_target", "qwen3_vanilla"))
    places: dict[str, dict[str, str]] = {}
    for role in ("target", "drafter"):
        for tensor in onnx.load(bundle.graph_path(role), load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                places[f"{role} {tensor.name}"] = {entry.key: entry.value for entry in tensor.external_data}
    shared = places["target embed_tokens.weight"]
    assert "target lm_head.weight" not in places
    for name in ("embed_tokens.weight", "lm_head.weight"):
        assert places[f"drafter {name}"] == shared
    assert shared["location"] == "target.onnx.data"
    (told,) = bundle.manifest.shared_weights
    assert told.initializers == {
        "target": ("embed_tokens.weight",),
        "drafter": ("embed_tokens.weight", "lm_head.weight"),
    }
    assert (told.file, told.offset, told.size) == (shared["location"], int(shared["offset"]), int(shared["length"]))
    with open(bundle.path / shared["location"], "rb") as file:
        file.seek(int(shared["offset"]))
        stored = np.frombuffer(file.read(int(shared["length"])), np.float32)
    expected = load_file(reference_dir / "qwen3_target" / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(stored, expected.numpy().reshape(-1))


def test_a_drafter_of_some_tokens_shares_the_embedding_alone(
    tmp_path: Path, make_target: Checkpoint, make_drafter: Checkpoint, export_once: Callable[..., Path]
) -> None:
    target = make_target(tmp_path / "target", tie_word_embeddings=False)
    drafter = make_drafter(tmp_path / "drafter", target, draft_vocab_size=64)
    manifest = Bundle.open(export_once("some", target, drafter, capacity=64)).manifest
    assert [dict(weight.initializers) for weight in manifest.shared_weights] == [
        {"target": ("embed_tokens.weight",), "drafter": ("embed_tokens.weight",)}
    ]
    whole = make_drafter(tmp_path / "whole", target)
    manifest = Bundle.open(export_once("whole", target, whole, capacity=64)).manifest
    assert [weight.initializers["drafter"] for weight in manifest.shared_weights] == [
        ("embed_tokens.weight",),
        ("lm_head.weight",),
    ]
    assert not Bundle.open(export_once("none", target, "ngram", capacity=64)).manifest.shared_weights
