"""Drafters that draft only some of the target's tokens: their graphs, and where the weights of these come from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.exporter.graph_runner import GraphRunner
from dspark_edge.exporter.lowerings import LOWERINGS
from dspark_edge.exporter.parity import compare_bundle

Checkpoint = Callable[..., Path]
Made = tuple[Bundle, Path, Path]
VOCABULARY, DRAFTED, BLOCK = 260, 40, 4
PRECISIONS = {"ort": "fp32", "onnx": "fp16", "decomposed": "fp32"}


@pytest.fixture(scope="session")
def make(
    tmp_path_factory: pytest.TempPathFactory,
    export_once: Callable[..., Path],
    make_target: Checkpoint,
    make_drafter: Checkpoint,
) -> Callable[[str, str], Made]:
    """`make(head, lowering)`: bundle, target and drafter; the drafter brings no copies of the target's weights.

    The bundle is exported with the default of 64 candidates, more than there are tokens to draft.
    """

    def pair(head: str, lowering: str) -> Made:
        folder = tmp_path_factory.mktemp("pair")
        target = make_target(folder / "target", tie_word_embeddings=head == "vanilla")
        options = {"markov_head_type": head, "draft_vocab_size": DRAFTED, "block_size": BLOCK}
        drafter = make_drafter(folder / "drafter", target, **options)
        weights = load_file(drafter / "model.safetensors")
        del weights["embed_tokens.weight"], weights["lm_head.weight"]
        save_file(weights, drafter / "model.safetensors")
        precision = PRECISIONS[lowering]
        name = f"drafting-{head}-{lowering}"
        bundle = export_once(name, target, drafter, lowering=lowering, precision=precision, capacity=96)
        return Bundle.open(bundle), target, drafter

    return pair


def drafted_ids(drafter: Path) -> npt.NDArray[np.int64]:
    ids: npt.NDArray[np.int64] = load_file(drafter / "model.safetensors")["draft_vocab_ids"].numpy()
    return ids


def stored(bundle: Bundle, name: str) -> npt.NDArray[np.generic]:
    """A parameter of the drafter's graph, from the bundle's data."""
    for tensor in onnx.load(bundle.graph_path("drafter")).graph.initializer:
        if tensor.name == name:
            array: npt.NDArray[np.generic] = onnx.numpy_helper.to_array(tensor)
            return array
    raise AssertionError(f"the drafter has no parameter {name}")


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_graphs_agree_with_torch(head: str, lowering: str, make: Callable[[str, str], Made]) -> None:
    bundle, target, drafter = make(head, lowering)
    facts = bundle.manifest.drafter
    assert (facts.draft_vocab_size, facts.candidates, facts.candidate_pool) == (DRAFTED, DRAFTED, 0)
    base_logits = next(spec for spec in bundle.manifest.graphs["drafter"].outputs if spec.name == "base_logits")
    assert base_logits.shape == ("batch", BLOCK, DRAFTED)
    report = compare_bundle(bundle, target, drafter)
    assert report.passed, report.to_json()
    if PRECISIONS[lowering] == "fp32":
        assert all(row.top1_agreement in (None, 1.0) for row in report.rows)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_tokens_of_the_draft_vocabulary_are_drafted(
    temperature: float, lowering: str, make: Callable[[str, str], Made]
) -> None:
    bundle, _, drafter = make("vanilla", lowering)
    allowed = drafted_ids(drafter)
    generator = np.random.default_rng(0)
    seen: set[int] = set()
    with OnnxRuntimeEngine(bundle, threads=1) as engine:
        runner = GraphRunner(engine, 96)
        runner.extend(generator.integers(0, VOCABULARY, (1, 9)))
        for anchor in range(VOCABULARY):  # any token can be an anchor
            noise = generator.gumbel(size=(1, BLOCK, DRAFTED)) * (temperature > 0)
            given = runner.draft(np.array([anchor]), temperature, noise.astype(np.float32))
            assert all(np.array_equal(np.sort(row), allowed) for row in given["candidate_ids"][0])
            seen.update(given["draft_ids"][0].tolist())
    assert seen <= set(allowed.tolist())
    assert len(seen) > 5


@pytest.mark.parametrize("head", ["vanilla", "rnn"])
def test_the_head_is_rows_of_the_targets(head: str, make: Callable[[str, str], Made]) -> None:
    """In fp16 here; ids stay what they are."""
    bundle, target, drafter = make(head, "onnx")
    weights, ids = load_file(target / "model.safetensors"), drafted_ids(drafter)
    rows = weights["model.embed_tokens.weight" if head == "vanilla" else "lm_head.weight"][torch.from_numpy(ids)]
    np.testing.assert_array_equal(stored(bundle, "lm_head.weight"), rows.half().numpy())
    table = stored(bundle, "draft_vocabulary.ids")
    assert table.dtype == np.int64
    np.testing.assert_array_equal(table, ids)


def test_a_wrong_table_is_found(make: Callable[[str, str], Made], tmp_path: Path) -> None:
    bundle, target, drafter = make("vanilla", "ort")
    model = onnx.load(bundle.graph_path("drafter"), load_external_data=False)
    table = next(tensor for tensor in model.graph.initializer if tensor.name == "draft_vocabulary.ids")
    place = {entry.key: entry.value for entry in table.external_data}
    damaged = tmp_path / "bundle"
    shutil.copytree(bundle.path, damaged)
    with open(damaged / place["location"], "r+b") as file:
        file.seek(int(place["offset"]))
        file.write(np.roll(drafted_ids(drafter), 1).tobytes())
    report = compare_bundle(damaged, target, drafter)
    assert {row.name for row in report.rows if not row.passed} == {"candidate_probs", "packed.candidate_probs"}
    agreement = {row.name: row.top1_agreement for row in report.rows}
    assert agreement["draft_ids"] == 0.0


def test_without_a_draft_vocabulary_there_is_no_table(reference_bundle: Callable[..., Path]) -> None:
    graph = onnx.load(Bundle.open(reference_bundle("qwen3_target", "qwen3_vanilla")).graph_path("drafter")).graph
    large = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT64 and tensor.dims]
    assert max(int(np.prod(tensor.dims)) for tensor in large) < 10
