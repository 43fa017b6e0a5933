"""Parity: bundles of every drafter variant agree with torch, and a bundle that is wrong does not."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Buffer
from dspark_edge.engines.errors import DSparkError, EngineError, InvalidInputError, MismatchError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.exporter.graph_runner import GraphRunner
from dspark_edge.exporter.lowerings import LOWERINGS
from dspark_edge.exporter.parity import ParityReport, compare_bundle, render

Checkpoint = Callable[..., Path]
ReferenceBundle = Callable[..., Path]

TARGET_OUTPUTS = ["logits", "present.key", "present.value"]
CONTEXT_OUTPUTS = ["drafter.present.key", "drafter.present.value"]
SAMPLERS = ["sampler_greedy", "sampler", "sampler_filtered"]

# name → target's options, drafter's options, export's options
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gated": (
        {},
        {"markov_head_type": "gated", "target_layer_ids": [-1, 1, 2], "block_size": 5},
        {"candidates": 16},
    ),
    "no-confidence": (
        {"architecture": "LlamaForCausalLM", "tie_word_embeddings": False, "attention_bias": True},
        {"enable_confidence_head": False, "confidence_head_with_markov": False, "block_size": 10},
        {"candidates": 260},
    ),
    "rank-0": (
        {"tie_word_embeddings": False},
        {"markov_rank": 0, "confidence_head_with_markov": False, "target_layer_ids": [2, -1], "num_hidden_layers": 1},
        {"candidates": 1000},  # more than the vocabulary
    ),
    "plain-confidence": (
        {"num_key_value_heads": 4},
        {"markov_head_type": "rnn", "confidence_head_with_markov": False, "block_size": 1},
        {"candidates": 1},
    ),
    "pool": ({}, {"num_hidden_layers": 1}, {"candidates": 4, "candidate_pool": 250}),
    "draft-vocabulary-pool": ({}, {"draft_vocab_size": 100}, {"candidates": 4, "candidate_pool": 90}),
}


@pytest.fixture(scope="session")
def variant(
    session_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    export_once: Callable[..., Path],
    make_target: Checkpoint,
    make_drafter: Checkpoint,
) -> Callable[..., tuple[Path, Path, Path]]:
    """`variant(name, lowering)`: bundle, target and drafter; the same checkpoints in every process."""

    def make(name: str, lowering: str = "ort") -> tuple[Path, Path, Path]:
        target_options, drafter_options, options = VARIANTS[name]
        folder = tmp_path_factory.mktemp(name)
        target = make_target(folder / "target", **target_options)
        drafter = make_drafter(folder / "drafter", target, **drafter_options)
        bundle = export_once(f"{name}-{lowering}", target, drafter, lowering=lowering, capacity=96, **options)
        return bundle, target, drafter

    return make


def names(report: ParityReport) -> list[str]:
    return [row.name for row in report.rows]


@pytest.mark.parametrize(
    ("name", "lowering"), [("gated", other) for other in LOWERINGS] + [(name, "ort") for name in list(VARIANTS)[1:]]
)
def test_variants_agree(name: str, lowering: str, variant: Callable[..., tuple[Path, Path, Path]]) -> None:
    bundle, target, drafter = variant(name, lowering)
    report = compare_bundle(bundle, target, drafter)
    assert report.passed, report.to_json()
    manifest = Bundle.open(bundle).manifest
    confidence = ["confidence_logits"] if manifest.drafter.confidence else []
    drafted = ["draft_ids", *confidence, "candidate_probs", "base_logits"]
    short = [f"short.{output}" for output in drafted] if manifest.short_block_size else []
    packed = [f"packed.{output}" for output in ("logits", *drafted)] if lowering == "ort" else []
    assert names(report) == [*TARGET_OUTPUTS, *CONTEXT_OUTPUTS, *drafted, *short, *packed, *SAMPLERS]
    for row in report.rows:
        assert row.max_abs_error <= 1e-4
        assert row.top1_agreement in (None, 1.0)


def test_without_a_drafter(reference_bundle: ReferenceBundle, reference_dir: Path) -> None:
    bundle = reference_bundle("llama_target", "ngram")
    calls: list[tuple[str, int, int]] = []
    report = compare_bundle(
        bundle, reference_dir / "llama_target", "ngram", positions=20, report=lambda *given: calls.append(given)
    )
    assert report.passed and report.positions == 20
    assert names(report) == [*TARGET_OUTPUTS, "packed.logits", *SAMPLERS]
    assert calls[0] == ("torch", 0, 1) and calls[-1][1] == calls[-1][2]


def test_the_report_as_json_and_as_a_table(reference_bundle: ReferenceBundle, reference_dir: Path) -> None:
    from rich.console import Console

    bundle = reference_bundle("qwen3_target", "qwen3_vanilla")
    report = compare_bundle(bundle, reference_dir / "qwen3_target", reference_dir / "qwen3_vanilla")
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["passed"] is True and data["lowering"] == "ort" and data["precision"] == "fp32"
    assert [row["name"] for row in data["rows"]] == names(report)
    text = io.StringIO()
    render(report, Console(file=text, width=120))
    assert all(name in text.getvalue() for name in names(report)) and "FAILED" not in text.getvalue()

    strict = compare_bundle(bundle, reference_dir / "qwen3_target", reference_dir / "qwen3_vanilla", tolerance=1e-12)
    assert not strict.passed and strict.to_json()["passed"] is False
    render(strict, Console(file=text, width=160))
    assert "FAILED" in text.getvalue()


def damaged(folder: Path, bundle: Path, role: str, initializer: str, factor: float) -> Path:
    """A copy of a bundle, of the same size, in which one parameter is scaled."""
    shutil.copytree(bundle, folder)
    model = onnx.load(folder / f"{role}.onnx", load_external_data=False)
    found = next(tensor for tensor in model.graph.initializer if tensor.name == initializer)
    place = {entry.key: entry.value for entry in found.external_data}
    with open(folder / place["location"], "r+b") as file:
        file.seek(int(place["offset"]))
        values = np.frombuffer(file.read(int(place["length"])), np.float32) * np.float32(factor)
        file.seek(int(place["offset"]))
        file.write(values.tobytes())
    return folder


@pytest.mark.parametrize(
    ("role", "initializer", "failing"),
    [
        ("target", "layers.5.mlp.down_proj.weight", {"logits"}),
        ("target", "context.k_norm.1.weight", {"drafter.present.key", "base_logits"}),
        ("drafter", "markov_head.markov_w2.weight", {"candidate_probs"}),
        ("drafter", "confidence_head.weight", {"confidence_logits"}),
    ],
)
def test_a_wrong_weight_is_found(
    role: str,
    initializer: str,
    failing: set[str],
    reference_bundle: ReferenceBundle,
    reference_dir: Path,
    tmp_path: Path,
) -> None:
    good = reference_bundle("qwen3_target", "qwen3_vanilla")
    bundle = damaged(tmp_path / "bundle", good, role, initializer, 1.01)
    report = compare_bundle(bundle, reference_dir / "qwen3_target", reference_dir / "qwen3_vanilla")
    failed = {row.name for row in report.rows if not row.passed}
    assert failing <= failed
    assert not failed & {*SAMPLERS, "present.key", "present.value"}
    if "drafter.present.key" in failing:
        worst = {row.name: row.worst for row in report.rows}
        assert worst["drafter.present.key"] == "drafter.present.1.key"


def test_layer_by_layer_the_first_that_is_wrong_is_found(
    reference_bundle: ReferenceBundle, reference_dir: Path, tmp_path: Path
) -> None:
    good = reference_bundle("qwen3_target", "qwen3_vanilla")
    checkpoints = reference_dir / "qwen3_target", reference_dir / "qwen3_vanilla"
    bundle = damaged(tmp_path / "bundle", good, "target", "layers.2.mlp.down_proj.weight", 1.05)
    rows = {row.name: row.passed for row in compare_bundle(bundle, *checkpoints, layers=True).rows}
    cached = [name for name in rows if name.startswith("present.")]
    assert cached == [f"present.{layer}.{kind}" for layer in range(6) for kind in ("key", "value")]
    assert [rows[name] for name in cached] == [True] * 6 + [False] * 6
    assert not rows["logits"]


class ShuffledEngine(OnnxRuntimeEngine):
    """Drafts the second-best candidate, as a graph with a wrong gather might."""

    def bind(self, role: str, buffers: Mapping[str, Buffer]) -> Any:
        call = super().bind(role, buffers)
        if role != "drafter":
            return call
        run = call.run

        class Wrong:
            def run(self) -> None:
                run()
                buffers["draft_ids"].write(buffers["candidate_ids"].read()[..., 1])

        return Wrong()


def test_drafts_that_are_not_the_best_candidates_are_found(
    reference_bundle: ReferenceBundle, reference_dir: Path
) -> None:
    bundle = reference_bundle("qwen3_target", "qwen3_vanilla")
    report = compare_bundle(
        bundle, reference_dir / "qwen3_target", reference_dir / "qwen3_vanilla", engine_factory=ShuffledEngine
    )
    failed = {row.name for row in report.rows if not row.passed}
    assert failed == {"draft_ids"}


@pytest.mark.parametrize(("role", "failing"), [("target", "packed.logits"), ("drafter", "packed.base_logits")])
def test_a_packed_graph_that_mixes_sequences_up_is_found(
    role: str, failing: str, reference_bundle: ReferenceBundle, reference_dir: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(reference_bundle("qwen3_target", "qwen3_vanilla"), bundle)
    model = onnx.load(bundle / f"{role}_packed.onnx", load_external_data=False)
    first, second = [node for node in model.graph.node if node.op_type == "GroupQueryAttention"][:2]
    first.input[5] = second.input[5]  # the first layer's first sequence is as long as the other
    (bundle / f"{role}_packed.onnx").write_bytes(model.SerializeToString())
    manifest = json.loads((bundle / "manifest.json").read_text())
    record = next(record for record in manifest["files"] if record["path"] == f"{role}_packed.onnx")
    record["size"] = (bundle / f"{role}_packed.onnx").stat().st_size
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    report = compare_bundle(bundle, reference_dir / "qwen3_target", reference_dir / "qwen3_vanilla")
    failed = {row.name for row in report.rows if not row.passed}
    assert failing in failed and all(name.startswith("packed.") for name in failed)


def test_checkpoints_of_another_pair(reference_bundle: ReferenceBundle, reference_dir: Path, tmp_path: Path) -> None:
    bundle = reference_bundle("qwen3_target", "qwen3_vanilla")
    target = reference_dir / "qwen3_target"
    with pytest.raises(MismatchError, match="kind of drafter is dspark in the bundle, ngram in the checkpoints"):
        compare_bundle(bundle, target, "ngram")
    with pytest.raises(MismatchError, match="markov_head is vanilla in the bundle, rnn in the checkpoints"):
        compare_bundle(bundle, target, reference_dir / "qwen3_rnn")
    other = tmp_path / "drafter"
    shutil.copytree(reference_dir / "qwen3_vanilla", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "block_size": 5}))
    with pytest.raises(MismatchError, match="block_size is 7 in the bundle, 5 in the checkpoints"):
        compare_bundle(bundle, target, other)


def test_a_fine_tuned_target_fails(reference_bundle: ReferenceBundle, reference_dir: Path, tmp_path: Path) -> None:
    """Sizes fit, weights do not: that is for the numbers to say."""
    shutil.copytree(reference_dir / "llama_target", tmp_path / "target")
    weights = load_file(tmp_path / "target" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= 1.02
    save_file(weights, tmp_path / "target" / "model.safetensors")
    report = compare_bundle(reference_bundle("llama_target", "ngram"), tmp_path / "target", "ngram")
    assert not report.passed


@pytest.mark.parametrize("positions", [0, 506])
def test_positions_beyond_the_capacity(positions: int, reference_bundle: ReferenceBundle, reference_dir: Path) -> None:
    bundle = reference_bundle("llama_target", "ngram")
    with pytest.raises(InvalidInputError, match=f"positions is {positions}, expected 1 to 505"):
        compare_bundle(bundle, reference_dir / "llama_target", "ngram", positions=positions)


def test_no_bundle(tmp_path: Path, reference_dir: Path) -> None:
    with pytest.raises(DSparkError, match="there is no bundle"):
        compare_bundle(tmp_path / "nothing", reference_dir / "llama_target", "ngram")


def test_graph_runner_needs_every_input(reference_bundle: ReferenceBundle) -> None:
    with OnnxRuntimeEngine(Bundle.open(reference_bundle("llama_target", "ngram")), threads=1) as engine:
        runner = GraphRunner(engine, 16)
        with pytest.raises(EngineError, match="no buffer is bound to the input 'cache_lengths'"):
            runner.run("target", {"input_ids": np.zeros((1, 1)), "logit_rows": np.zeros((1, 1))})
