"""Packed graphs say bit for bit what their originals say of one sequence at a time, and nothing of who is not there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("torch", reason="packing graphs needs the [export] extra")

import onnx_ir as ir
import onnxruntime

from dspark_edge.engines.bundle import Bundle
from dspark_edge.exporter.packing import pack_drafter, pack_target
from dspark_edge.exporter.tracing import GraphContract

from ..conftest import ReferenceBundle

pytestmark = pytest.mark.needs_export

SEQUENCES, CAPACITY = 3, 32
CACHED = (5, 0, 17)

Arrays = dict[str, npt.NDArray[Any]]


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def bundle(request: pytest.FixtureRequest, reference_bundle: ReferenceBundle) -> Bundle:
    return Bundle.open(reference_bundle(f"{request.param}_target", f"{request.param}_vanilla"))


def contract_of(bundle: Bundle, role: str) -> GraphContract:
    graph = bundle.manifest.graphs[role]
    return GraphContract(graph.inputs, graph.outputs, graph.aliases)


def session_of(bundle: Bundle, graph: str | ir.Model) -> Any:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
    given = str(bundle.graph_path(graph)) if isinstance(graph, str) else ir.to_proto(graph).SerializeToString()
    return onnxruntime.InferenceSession(given, options)


def run(session: Any, given: Arrays) -> Arrays:
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, given), strict=True))


def made_caches(contract: GraphContract) -> list[Arrays]:
    """Of each sequence."""
    random = np.random.default_rng(0)
    caches = [spec for spec in contract.flat_inputs if spec.name in contract.aliases.values()]
    return [
        {
            spec.name: random.normal(size=(1, spec.shape[1], CAPACITY, spec.shape[3])).astype(np.float32)
            for spec in caches
        }
        for _ in range(SEQUENCES)
    ]


def of_all(caches: list[Arrays]) -> Arrays:
    return {f"{name}.{s}": array for s, one in enumerate(caches) for name, array in one.items()}


def test_a_packed_target_is_the_target_of_each_sequence(bundle: Bundle) -> None:
    contract = contract_of(bundle, "target")
    model, packed_contract = pack_target(ir.load(str(bundle.graph_path("target"))), contract, SEQUENCES)
    one, packed = session_of(bundle, "target"), session_of(bundle, model)
    assert [value.name for value in packed.get_inputs()] == [spec.name for spec in packed_contract.flat_inputs]
    caches = made_caches(contract)
    tokens = [np.array([[7, 9, 11]]), np.array([[13]]), None]  # the last one is not there
    got = run(
        packed,
        {
            "input_ids": np.array([[7, 9, 11, 13]]),
            "cache_lengths": np.array(CACHED),
            "logit_rows": np.array([[0, 1, 2, 3]]),
            "widths": np.array([3, 1, 0]),
            **of_all(caches),
        },
    )
    logits = iter(got["logits"][0])
    for s, ids in enumerate(tokens):
        if ids is None:
            continue
        rows = np.arange(ids.shape[1])[None]
        alone = run(one, {"input_ids": ids, "cache_lengths": np.array([CACHED[s]]), "logit_rows": rows, **caches[s]})
        for row in alone["logits"][0]:
            # A row of another number of rows is rounded elsewhere in its last bits.
            assert next(logits) == pytest.approx(row, abs=1e-4)
        for output in contract.aliases:
            assert got[f"{output}.{s}"] == pytest.approx(alone[output], abs=1e-5)


def test_a_packed_drafter_drafts_for_each_sequence(bundle: Bundle) -> None:
    contract, facts = contract_of(bundle, "drafter"), bundle.manifest.drafter
    model, packed_contract = pack_drafter(
        ir.load(str(bundle.graph_path("drafter"))), contract, SEQUENCES, facts.block_size
    )
    one, packed = session_of(bundle, "drafter"), session_of(bundle, model)
    assert [value.name for value in packed.get_outputs()] == [spec.name for spec in packed_contract.outputs]
    caches, drafting, anchors = made_caches(contract), [0, 1], {0: 5, 1: 8}

    def inputs(batch: list[int]) -> Arrays:
        return {
            "anchor_ids": np.array([anchors[s] for s in batch]),
            "temperature": np.zeros(len(batch), np.float32),
            "noise": np.zeros((len(batch), facts.block_size, facts.candidates), np.float32),
        }

    got = run(
        packed,
        {
            **inputs(drafting),
            "cache_lengths": np.array(CACHED),
            **of_all(caches),
        },
    )
    for row, s in enumerate(drafting):
        alone = run(one, {**inputs([s]), "cache_lengths": np.array([CACHED[s]]), **caches[s]})
        assert got["draft_ids"][row].tolist() == alone["draft_ids"][0].tolist()
        assert got["base_logits"][row] == pytest.approx(alone["base_logits"][0], abs=1e-4)


def test_a_size_that_only_one_sequence_has_is_refused(bundle: Bundle) -> None:
    model = ir.load(str(bundle.graph_path("target")))
    cache = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    ir.tape.Tape(model.graph).op("Shape", [cache], {"start": 2, "end": 3})
    with pytest.raises(RuntimeError, match="other than the batch"):
        pack_target(model, contract_of(bundle, "target"), SEQUENCES)
