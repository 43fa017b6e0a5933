"""The drafter's graph for short blocks: right, of the same weights, and used where few tokens are wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.exporter.export import ExportOptions, export_bundle
from dspark_edge.exporter.parity import compare_bundle
from dspark_edge.runtime import Generator, SamplingParams
from dspark_edge.runtime.generator import GeneratorOptions
from dspark_edge.runtime.model import ModelDrafter, ModelVerifier
from dspark_edge.runtime.profiling import plan_profile, profile_engine
from dspark_edge.runtime.round import Request, Round
from dspark_edge.runtime.sampling import RandomStream
from dspark_edge.runtime.sequence import Sequence

from ..conftest import ReferenceBundle


@pytest.fixture(scope="module")
def bundle(reference_bundle: ReferenceBundle) -> Bundle:
    return Bundle.open(reference_bundle("qwen3_target", "qwen3_rnn"))


def test_half_a_block_is_exported_with_the_weights_of_the_whole(bundle: Bundle) -> None:
    manifest = bundle.manifest
    assert (manifest.drafter.block_size, manifest.short_block_size) == (7, 3)
    assert not bundle.has("drafter_short.onnx.data")
    places: dict[str, dict[str, dict[str, str]]] = {}
    for role in ("drafter", "drafter_short"):
        model = onnx.load(bundle.graph_path(role), load_external_data=False)
        places[role] = {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}
            for tensor in model.graph.initializer
            if tensor.external_data
        }
    assert places["drafter"] and places["drafter_short"] == places["drafter"]


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_parity_compares_short_blocks(precision: str, reference_dir: Path, tmp_path: Path) -> None:
    target, drafter = reference_dir / "llama_target", reference_dir / "llama_vanilla"
    level = {"accuracy_level": 1} if precision == "int4" else {}
    options = ExportOptions(precision=precision, capacity=128, short_block=2, packed_sequences=0, **level)
    report = compare_bundle(export_bundle(target, drafter, tmp_path / "bundle", options), target, drafter)
    assert report.passed, report.to_json()
    names = [row.name for row in report.rows]
    assert {"short.draft_ids", "short.confidence_logits", "short.candidate_probs"} <= set(names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_block": 7}, "short_block is 7, expected fewer than a block's 7"),
        ({"short_block": -1}, "short_block is -1, expected 0 or more"),
        ({"short_block": 2, "lowering": "onnx"}, "the 'onnx' lowering has no short drafts; choose 'ort'"),
    ],
)
def test_short_blocks_that_cannot_be(
    options: dict[str, Any], message: str, reference_dir: Path, tmp_path: Path
) -> None:
    pair = reference_dir / "qwen3_target", reference_dir / "qwen3_rnn"
    with pytest.raises(InvalidInputError, match=message):
        export_bundle(*pair, tmp_path / "bundle", ExportOptions(capacity=64, **options))
    assert not list(tmp_path.iterdir())


def test_none_where_none_is_wanted(reference_dir: Path, tmp_path: Path) -> None:
    pair = reference_dir / "qwen3_target", reference_dir / "qwen3_rnn"
    bundle = export_bundle(*pair, tmp_path / "bundle", ExportOptions(capacity=64, short_block=0))
    assert bundle.manifest.short_block_size == 0 and "drafter_short" not in bundle.manifest.graphs


def test_the_smallest_block_that_has_enough_is_drafted(bundle: Bundle) -> None:
    with OnnxRuntimeEngine(bundle, threads=1) as engine:
        verifier = ModelVerifier(engine, prefill_chunk=16)
        drafter = ModelDrafter(engine, verifier.caches)
        sequence = Sequence(list(range(1, 10)), 9, 0)
        request = Request(sequence, SamplingParams(max_new_tokens=8), RandomStream(0))
        verdict = verifier.prefill(request)
        sequence.commit((verdict.next_id,), verdict.log_probs)
        sizes = {length: len(drafter.draft(request, length).token_ids) for length in (1, 3, 4, 7)}
        assert sizes == {1: 3, 3: 3, 4: 7, 7: 7}
        short = drafter.draft(request, 2)
        assert short.confidences is not None and len(short.confidences) == 3
        candidates = short.candidates
        assert candidates is not None and candidates.candidate_probs.shape[:2] == (1, 3)
        kept = np.array(candidates.draft_ids.read())
        drafter.draft(request, 7)  # in buffers of its own: the short draft can still be judged
        np.testing.assert_array_equal(candidates.draft_ids.read(), kept)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("length", [2, 5])
def test_fixed_lengths_draft_no_more_than_they_need(bundle: Bundle, length: int, temperature: float) -> None:
    """And greedy tokens are those of plain decoding."""
    rounds: list[Round] = []
    params = SamplingParams(max_new_tokens=40, temperature=temperature, seed=3)
    answers = {}
    for mode in ("plain", "static"):
        options = GeneratorOptions(mode=mode, verify_length=length) if mode == "static" else GeneratorOptions(mode=mode)
        with Generator(OnnxRuntimeEngine(bundle, threads=1), options, observer=rounds.append) as generator:
            answers[mode] = generator.generate([5, 6, 7, 8], params).token_ids
    drafted = {one.drafted for one in rounds if one.drafted}
    assert drafted == {3 if length <= 3 else 7}
    if temperature == 0:
        assert answers["static"] == answers["plain"]


def test_blocks_of_both_sizes_are_profiled(bundle: Bundle) -> None:
    from dspark_edge.engines.profile_device import probe_device

    plan = plan_profile(bundle.manifest, widths=[2], contexts=[32], budget_s=0.001)
    assert plan.widths[:3] == (1, 2, 4) and 8 in plan.widths
    with OnnxRuntimeEngine(bundle, threads=1) as engine:
        profile = profile_engine(engine, plan, probe_device("cpu", 1))
    for role in ("drafter", "drafter_drawing"):
        assert [point.width for point in profile.points[role]] == [3, 7]
    assert 0 < profile.draft_s(1, 32, 3) <= profile.draft_s(1, 32)
