"""The graph rewrites that put quantised weights in place of float ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from dspark_edge.exporter.quantization import (
    BlockFormat,
    BlockSource,
    LastMatrix,
    Part,
    WeightFormats,
    offset_columns,
)
from dspark_edge.exporter.weights import Source

__all__ = ["DequantizeWeights", "QuantizeWeights", "quantize_graph"]

_MICROSOFT = "com.microsoft"


class _WeightRewrite(ir.passes.InPlacePass):
    """What the rewrites share: which nodes have a weight that is to be in blocks, and the initializers of its parts.

    Args:
        formats: of the parameters.
    """

    types: ClassVar[Mapping[Part, ir.DataType]]
    """The parts that a weight becomes, in the order of the operator's inputs."""

    def __init__(self, formats: WeightFormats) -> None:
        super().__init__()
        self.formats = formats
        self.parts: dict[str, tuple[str, Part]] = {}  # new initializer → the weight that it is a part of, and which

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            weight, layout = self._weight_of(node, model.graph)
            if weight is None or layout is None:
                continue
            self._rewrite(model.graph, node, weight, layout)
            modified = True
            if not weight.uses():
                del model.graph.initializers[str(weight.name)]
        if modified:
            self._finish(model)
        return ir.passes.PassResult(model, modified)

    def _rewrite(self, graph: ir.Graph, node: ir.Node, weight: ir.Value, layout: BlockFormat) -> None:
        """Put blocks in place of a node's weight."""
        raise NotImplementedError

    def _finish(self, model: ir.Model) -> None:
        """After the last node, if there was any."""

    def _weight_of(self, node: ir.Node, graph: ir.Graph) -> tuple[ir.Value | None, BlockFormat | None]:
        """The node's input that is to be in blocks, and their format."""
        for value in node.inputs:
            if value is not None and value.name in graph.initializers:
                layout = self.formats.of(str(value.name))
                if layout is not None:
                    return value, layout
        return None, None

    def _part(self, graph: ir.Graph, weight: ir.Value, part: Part, shape: tuple[int, ...], suffix: str) -> ir.Value:
        """The initializer of a part, made when it is first asked for."""
        name = f"{weight.name}.{suffix}"
        if name not in graph.initializers:
            value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(self.types[part]))
            graph.initializers[name] = value
            self.parts[name] = str(weight.name), part
        return graph.initializers[name]


class QuantizeWeights(_WeightRewrite):
    """Products with a weight, and look-ups in one, become operators on its blocks.

    Before::

        y = MatMul(x, weight)                 weight [K, N]
        y = Gemm <transB = 1> (x, weight)     weight [N, K]
        y = Gather(weight, ids)               weight [N, K]

    After::

        y = MatMulNBits <K, N> (x, weight.blocks, weight.scales, weight.zero_points)
        y = MatMulNBits <K, N> (x, weight.blocks, weight.scales, weight.zero_points)
        y = GatherBlockQuantized(weight.rows, ids, weight.scales, weight.zero_points)

    A product whose rows have offset columns (`quantization.offset_columns`) gets the sums of its input's blocks for
    them, b weights in a block::

        sums = ReduceSum <keepdims = 0> (Reshape(x, [0, …, K / b, b]), axes)
        y = MatMulNBits <K + K / b, N> (Concat(x, sums), weight.blocks, weight.scales, weight.zero_points)

    `weight.rows` has the bytes of `weight.blocks` in two dimensions, and shares them on disk: a tied embedding and
    head are stored once.

    Preconditions: the formats name the initializer; Gemm has no bias; the rows of a matrix that is looked up in
    are whole blocks. Postcondition: `parts` has the part of every new initializer, by its name.
    """

    types: ClassVar[Mapping[Part, ir.DataType]] = {
        "blocks": ir.DataType.UINT8,
        "scales": ir.DataType.FLOAT,
        "zero_points": ir.DataType.UINT8,
    }

    def __init__(
        self, formats: WeightFormats, accuracy_level: int, offset_columns: Mapping[str, int] | None = None
    ) -> None:
        """
        Args:
            offset_columns: of weights that have any, by name.
        """
        super().__init__(formats)
        self.accuracy_level = accuracy_level
        self.offset_columns = offset_columns or {}

    def _rewrite(self, graph: ir.Graph, node: ir.Node, weight: ir.Value, layout: BlockFormat) -> None:
        new = (self._look_up if node.op_type == "Gather" else self._product)(graph, node, weight, layout)
        old, result = node.outputs[0], new.outputs[0]
        result.name, result.type, result.shape = old.name, old.type, old.shape
        graph.insert_before(node, new)
        ir.convenience.replace_all_uses_with([old], [result], replace_graph_outputs=True)
        graph.remove(node, safe=True)

    def _finish(self, model: ir.Model) -> None:
        model.opset_imports[_MICROSOFT] = 1

    def _product(self, graph: ir.Graph, node: ir.Node, weight: ir.Value, layout: BlockFormat) -> ir.Node:
        transposed = node.op_type == "Gemm"
        attributes = node.attributes
        if transposed:
            fits = len(node.inputs) == 2 and attributes["transB"].as_int() == 1 and attributes["alpha"].as_float() == 1
        else:
            fits = node.op_type == "MatMul"
        if not fits or node.inputs[1] is not weight:
            raise RuntimeError(f"{weight.name} is used by {node.op_type}, which has no form for quantised weights")
        first, second = _sizes(weight)
        rows, size = (first, second) if transposed else (second, first)
        states = node.inputs[0]
        if self.offset_columns.get(str(weight.name)):
            states = _with_block_sums(graph, node, layout.block_size, size)
            size += self.offset_columns[str(weight.name)]
        parts = [self._part(graph, weight, part, layout.part_shape(part, rows, size), part) for part in self.types]
        settings = {"K": size, "N": rows, "bits": layout.bits, "block_size": layout.block_size}
        settings["accuracy_level"] = self.accuracy_level
        return _node("MatMulNBits", [states, *parts], settings, node.name)

    def _look_up(self, graph: ir.Graph, node: ir.Node, weight: ir.Value, layout: BlockFormat) -> ir.Node:
        rows, size = _sizes(weight)
        if size % layout.block_size or node.inputs[0] is not weight:
            raise RuntimeError(f"{weight.name}: rows of {size} are not whole blocks of {layout.block_size}")
        _, blocks, bytes_of_a_block = layout.part_shape("blocks", rows, size)
        parts = [self._part(graph, weight, "blocks", (rows, blocks * bytes_of_a_block), "rows")]
        for part in ("scales", "zero_points"):
            parts.append(self._part(graph, weight, part, layout.part_shape(part, rows, size), part))
        settings = {
            "gather_axis": 0,
            "quantize_axis": 1,
            "bits": layout.bits,
            "block_size": layout.block_size,
        }
        return _node("GatherBlockQuantized", [parts[0], node.inputs[1], *parts[1:]], settings, node.name)


class DequantizeWeights(_WeightRewrite):
    """Weights of products become signed numbers of 4 bits behind DequantizeLinear: standard operators, of opset 21.

    Before::

        y = MatMul(x, weight)                                                 weight [K, N]

    After::

        values = DequantizeLinear <axis = 0, block_size> (weight.numbers, weight.scales)
        y = MatMul(x, values)                          weight.numbers [K, N] int4, weight.scales [K / block_size, N]

    TensorRT multiplies with the numbers themselves. Preconditions: the formats name the initializer, and are signed; K
    is whole blocks. Postcondition: `parts` has the part of every new initializer, by its name.
    """

    types: ClassVar[Mapping[Part, ir.DataType]] = {"numbers": ir.DataType.INT4, "scales": ir.DataType.FLOAT16}

    def _rewrite(self, graph: ir.Graph, node: ir.Node, weight: ir.Value, layout: BlockFormat) -> None:
        if node.op_type != "MatMul" or node.inputs[1] is not weight:
            raise RuntimeError(f"{weight.name} is used by {node.op_type}, which has no form for quantised weights")
        size, rows = _sizes(weight)
        if size % layout.block_size:
            raise RuntimeError(f"{weight.name}: rows of {size} are not whole blocks of {layout.block_size}")
        if weight.dtype != ir.DataType.FLOAT16:
            raise RuntimeError(f"{weight.name} is {weight.dtype}, but scales of signed blocks are float16")
        inputs = [
            self._part(graph, weight, part, layout.part_shape(part, rows, size)[::-1], part) for part in self.types
        ]
        settings = {"axis": 0, "block_size": layout.block_size}
        new = _node("DequantizeLinear", inputs, settings, f"{weight.name}.dequantize", domain="")
        values = new.outputs[0]
        values.name, values.type, values.shape = f"{weight.name}.values", weight.type, weight.shape
        graph.insert_before(node, new)
        node.replace_input_with(1, values)


def _with_block_sums(graph: ir.Graph, node: ir.Node, block_size: int, size: int) -> ir.Value:
    """A product's input [..., K], and behind it the sum of each block: [..., K + K / block size]."""
    states = node.inputs[0]
    if states is None or states.shape is None or size % block_size:
        raise RuntimeError(f"{node.name}: an input whose shape is known and whole blocks of {block_size} was expected")
    rank, blocks, prefix = len(states.shape), size // block_size, states.name
    shape = _constant(graph, f"blocks_of.{rank}.{blocks}", [*[0] * (rank - 1), blocks, block_size])
    split = _node("Reshape", [states, shape], {}, f"{prefix}.blocks", domain="")
    sums = _node(
        "ReduceSum",
        [split.outputs[0], _constant(graph, f"blocks_of.{rank}.axis", [rank])],
        {"keepdims": 0},
        f"{prefix}.sums",
        domain="",
    )
    joined = _node("Concat", [states, sums.outputs[0]], {"axis": rank - 1}, f"{prefix}.with_sums", domain="")
    leading = list(states.shape)[:-1]
    for new, last in ((split, [blocks, block_size]), (sums, [blocks]), (joined, [size + blocks])):
        new.outputs[0].name, new.outputs[0].type = f"{new.name}.out", states.type
        new.outputs[0].shape = ir.Shape([*leading, *last])
        graph.insert_before(node, new)
    return joined.outputs[0]


def _constant(graph: ir.Graph, name: str, values: Sequence[int]) -> ir.Value:
    """An initializer of int64, made when it is first asked for."""
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(np.array(values, np.int64), name=name)))
    return graph.initializers[name]


def _sizes(weight: ir.Value) -> tuple[int, int]:
    if weight.shape is None or len(weight.shape) != 2:
        raise RuntimeError(f"{weight.name} is no matrix")
    first, second = weight.shape.numpy()
    return first, second


def _node(
    kind: str,
    inputs: Sequence[ir.Value | None],
    settings: Mapping[str, int],
    name: str | None,
    domain: str = _MICROSOFT,
) -> ir.Node:
    attributes: list[Any] = [ir.AttrInt64(key, value) for key, value in settings.items()]
    return ir.Node(domain, kind, inputs, attributes, num_outputs=1, name=name)


def quantize_graph(
    model: ir.Model, sources: Mapping[str, Source], formats: WeightFormats, accuracy_level: int | None
) -> dict[str, Source]:
    """Rewrite a traced graph in place; the sources of its parameters from then on.

    Args:
        accuracy_level: of ONNX Runtime's products; None: weights stand behind DequantizeLinear.
    """
    rewrite: _WeightRewrite
    if accuracy_level is None:
        rewrite = DequantizeWeights(formats)
    else:
        layouts = {name: layout for name in sources if (layout := formats.of(name)) is not None}
        columns = {name: offset_columns(sources[name], layout) for name, layout in layouts.items()}
        rewrite = QuantizeWeights(formats, accuracy_level, columns)
    rewrite(model)
    last = LastMatrix()
    parts: dict[str, Source] = {}
    for name, (weight, part) in rewrite.parts.items():
        layout = formats.of(weight)
        if layout is None:
            raise RuntimeError(f"{weight} was rewritten without a format")
        parts[name] = BlockSource(sources[weight], layout, part, last)
    replaced = {weight for weight, _ in rewrite.parts.values()}
    return {**{name: source for name, source in sources.items() if name not in replaced}, **parts}
