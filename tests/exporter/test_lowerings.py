"""What each lowering puts into the graphs, and that the graphs do with it what they must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.exporter.graph_runner import GraphRunner
from dspark_edge.exporter.lowerings import LOWERINGS, get_lowering
from dspark_edge.exporter.parity import compare_bundle

ReferenceBundle = Callable[..., Path]

# Standard operators of opset 18 and before that graphs of every lowering may have.
# fmt: off
PLAIN = frozenset({
    "Add", "And", "ArgMax", "Cast", "Clip", "Concat", "ConstantOfShape", "CumSum", "Div", "Equal", "Exp",
    "Expand", "Gather", "GatherElements", "Gemm", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Log",
    "MatMul", "Max", "Min", "Mul", "Neg", "Not", "Or", "Pad", "Range", "ReduceMax", "ReduceMean", "ReduceMin",
    "ReduceSum", "Reshape", "ScatterElements", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Squeeze",
    "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze", "Where",
})
# fmt: on
NEWER = frozenset({"Attention", "TensorScatter", "RotaryEmbedding", "RMSNormalization"})
ALLOWED: dict[str, dict[str, frozenset[str]]] = {
    "decomposed": {"": PLAIN},
    "onnx": {"": PLAIN | NEWER},
    "ort": {
        "": (PLAIN | NEWER) - {"Attention"},
        "com.microsoft": frozenset({"GroupQueryAttention", "SkipSimplifiedLayerNormalization"}),
    },
}


@pytest.fixture(params=LOWERINGS)
def bundle(request: pytest.FixtureRequest, reference_bundle: ReferenceBundle) -> Bundle:
    return Bundle.open(reference_bundle("qwen3_target", "qwen3_rnn", request.param))


def graph_of(bundle: Bundle, role: str) -> onnx.ModelProto:
    return onnx.load(bundle.graph_path(role), load_external_data=False)


def test_operators(bundle: Bundle) -> None:
    lowering = bundle.manifest.lowering
    allowed = ALLOWED[lowering]
    for role in bundle.manifest.graphs:
        model = graph_of(bundle, role)
        versions = {entry.domain: entry.version for entry in model.opset_import}
        assert versions.keys() <= allowed.keys()
        assert versions[""] == (
            get_lowering(lowering).context_opset if role.startswith("target") else get_lowering(lowering).opset
        )
        assert not model.functions and model.ir_version <= 11
        for node in model.graph.node:
            assert node.op_type in allowed[node.domain], (role, node.name)
            assert not node.metadata_props and not node.doc_string  # they would name paths of the exporting machine
    assert bundle.manifest.opsets.keys() == allowed.keys()
    assert bundle.manifest.opsets[""] == get_lowering(lowering).context_opset


def test_contracts_are_the_graphs(bundle: Bundle) -> None:
    for role, spec in bundle.manifest.graphs.items():
        graph = graph_of(bundle, role).graph
        for values, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
            assert [value.name for value in values] == [tensor.name for tensor in tensors]
            for value, tensor in zip(values, tensors, strict=True):
                kind = value.type.tensor_type
                assert onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name == tensor.dtype
                shape = tuple(size.dim_param or size.dim_value for size in kind.shape.dim)
                assert shape == tensor.shape


def test_standard_graphs_pass_the_checker(bundle: Bundle) -> None:
    for role in bundle.manifest.graphs:
        if bundle.manifest.lowering != "ort" or role.startswith("sampler"):
            onnx.checker.check_model(bundle.graph_path(role), full_check=True)


@pytest.mark.parametrize("role", ["target", "drafter"])
def test_attention_nodes_are_what_backends_take(bundle: Bundle, role: str) -> None:
    model = graph_of(bundle, role)
    layers = bundle.manifest.target.num_layers if role == "target" else bundle.manifest.drafter.num_layers
    nodes = [node for node in model.graph.node if "Attention" in node.op_type]
    attributes = [{entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute} for node in nodes]
    if bundle.manifest.lowering == "decomposed":
        assert not nodes
        return
    assert len(nodes) == layers
    if bundle.manifest.lowering == "onnx":
        for node, given in zip(nodes, attributes, strict=True):
            assert len(node.input) == 4 and all(node.input)
            assert len(node.output) == 1
            assert not given.get("is_causal", 0) and not given.get("softcap", 0.0)
    else:
        for given in attributes:  # absent where it is the default: older releases do not know it
            assert given.get("causal") == (None if role == "target" else 0)


@pytest.mark.parametrize("role", ["target", "drafter"])
def test_positions_and_masks_are_computed_once(bundle: Bundle, role: str) -> None:
    nodes = graph_of(bundle, role).graph.node
    kinds = [node.op_type for node in nodes]
    if bundle.manifest.lowering == "ort":
        lengths = {tuple(node.input[5:7]) for node in nodes if node.op_type == "GroupQueryAttention"}
        assert len(lengths) == 1
    else:
        assert kinds.count("LessOrEqual") == 1
    positions = [node for node in nodes if node.op_type == "Add" and "cache_lengths" in "".join(node.input)]
    assert len(positions) <= 1
    assert kinds.count("Range") <= 2  # positions of the rows, slots of the cache


def test_capacity_is_open_only_where_it_may_be(bundle: Bundle) -> None:
    expected = "capacity" if get_lowering(bundle.manifest.lowering).dynamic_capacity else 512
    for role in ("target", "drafter"):
        graph = bundle.manifest.graphs[role]
        caches = [spec for spec in graph.inputs if spec.name in graph.aliases.values()]
        assert caches and {spec.shape[2] for spec in caches} == {expected}


@pytest.mark.parametrize("lowering", ["onnx", "decomposed"])
def test_sequences_of_a_batch_do_not_see_each_other(lowering: str, reference_bundle: ReferenceBundle) -> None:
    """Two sequences of different length in one call give what each gives alone."""
    bundle = Bundle.open(reference_bundle("qwen3_target", "qwen3_rnn", lowering))
    generator = np.random.default_rng(0)
    prompts = [generator.integers(0, 256, (1, length)) for length in (9, 4)]
    steps = generator.integers(0, 256, (2, 3))
    anchors = generator.integers(0, 256, 2)
    facts = bundle.manifest.drafter
    noise = generator.gumbel(size=(2, facts.block_size, facts.candidates)).astype(np.float32)
    with OnnxRuntimeEngine(bundle, threads=1) as engine:
        together = GraphRunner(engine, 512, batch=2)
        alone = []
        for row, prompt in enumerate(prompts):
            runner = GraphRunner(engine, 512)
            runner.extend(prompt)
            for name, cache in runner.caches.items():
                together.caches[name].read()[row] = cache.read()[0]
            own = slice(row, row + 1)
            alone.append((runner.extend(steps[own]), runner.draft(anchors[own], 0.7, noise[own])))
        together.lengths = np.array([9, 4])
        logits = together.extend(steps)
        drafts = together.draft(anchors, 0.7, noise)
    for row, (own_logits, own_drafts) in enumerate(alone):
        np.testing.assert_allclose(logits[row], own_logits[0], atol=1e-4)
        for name, values in own_drafts.items():
            np.testing.assert_allclose(drafts[name][row], values[0], atol=1e-4, err_msg=name)


def test_half_precision(export_once: Callable[..., Path], reference_dir: Path) -> None:
    """fp16 where a GPU wants it; fp32 where sums are long or values large, and in everything the runtime reads."""
    target, drafter = reference_dir / "qwen3_target", reference_dir / "qwen3_rnn"
    folder = export_once("fp16", target, drafter, lowering="onnx", precision="fp16", capacity=128)
    bundle = Bundle.open(folder)
    wide = {"context.fc.weight", "context.hidden_norm.weight"}
    for role in ("target", "drafter"):
        for tensor in graph_of(bundle, role).graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            is_wide = tensor.name in wide or tensor.name.startswith(("markov_head.", "confidence_head."))
            expected = onnx.TensorProto.FLOAT if is_wide else onnx.TensorProto.FLOAT16
            assert tensor.data_type == expected, tensor.name
        graph = bundle.manifest.graphs[role]
        for spec in (*graph.inputs, *graph.outputs):
            is_cache = spec.name in graph.aliases or spec.name in graph.aliases.values()
            assert (spec.dtype == "float16") == is_cache, spec.name
    report = compare_bundle(bundle, target, drafter)
    assert report.passed
    agreement = {row.name: row.top1_agreement for row in report.rows}
    assert agreement["logits"] >= 0.9 and agreement["draft_ids"] >= 0.9  # type: ignore[operator]


def test_an_unknown_lowering_is_named() -> None:
    with pytest.raises(InvalidInputError, match="unknown lowering 'tensorrt'; choose one of: ort, onnx, decomposed"):
        get_lowering("tensorrt")
