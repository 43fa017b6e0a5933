"""Graph rewrites of the `ort` lowering: fewer, larger operators, as ONNX Runtime's CPU kernels like them.

Each finds one pattern of `onnx_ir` nodes and replaces it; before and after stand in its docstring.
"""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["FuseSkipNorm", "PackQueryKeyValue"]

_MICROSOFT = "com.microsoft"


def _only_use(value: ir.Value | None) -> ir.Node | None:
    """The node that is the value's only consumer; None if there are more, or the graph itself delivers it."""
    if value is None or value.is_graph_output():
        return None
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 else None


class PackQueryKeyValue(ir.passes.InPlacePass):
    """GroupQueryAttention splits a packed projection itself.

    Before::

        q, k, v = Split(qkv, sizes)
        out, key, value = GroupQueryAttention(q, k, v, past_key, …)

    After::

        out, key, value = GroupQueryAttention(qkv, , , past_key, …)

    Precondition: q, k and v have no other use (families that norm queries and keys do).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in model.graph:
            if node.op_type != "GroupQueryAttention" or node.domain != _MICROSOFT:
                continue
            parts = node.inputs[:3]
            split = parts[0].producer() if parts[0] is not None else None
            if split is None or split.op_type != "Split" or tuple(split.outputs) != tuple(parts):
                continue
            if any(_only_use(part) is not node for part in parts):
                continue
            node.replace_input_with(0, split.inputs[0])
            node.replace_input_with(1, None)
            node.replace_input_with(2, None)
            model.graph.remove(split, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


class FuseSkipNorm(ir.passes.InPlacePass):
    """A residual addition and the norm behind it become one operator.

    Before::

        sum = Add(skip, states)
        normed = RMSNormalization(sum, weight)

    After::

        normed, , , sum = SkipSimplifiedLayerNormalization(skip, states, weight)

    Precondition: the norm is over the last dimension, and both summands have three dimensions (residual streams do).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for node in list(model.graph):
            total = node.inputs[0] if node.op_type == "RMSNormalization" else None
            add = total.producer() if total is not None else None
            if total is None or add is None or add.op_type != "Add" or total.is_graph_output():
                continue
            if any(value is None or value.shape is None or len(value.shape) != 3 for value in add.inputs):
                continue
            fused = ir.Node(
                _MICROSOFT,
                "SkipSimplifiedLayerNormalization",
                [*add.inputs, node.inputs[1]],
                [ir.AttrFloat32("epsilon", node.attributes["epsilon"].as_float())],
                num_outputs=4,
                name=node.name,
            )
            for old, new in ((node.outputs[0], fused.outputs[0]), (total, fused.outputs[3])):
                new.name, new.type, new.shape = old.name, old.type, old.shape
            for absent in fused.outputs[1:3]:
                absent.name = ""
            model.graph.insert_before(node, fused)
            # Other readers of the sum come behind the norm in every family here; sorting keeps that no assumption.
            ir.convenience.replace_all_uses_with(list(node.outputs), [fused.outputs[0]], replace_graph_outputs=True)
            ir.convenience.replace_all_uses_with([total], [fused.outputs[3]], replace_graph_outputs=True)
            model.graph.remove([node, add], safe=True)
            modified = True
        if modified:
            model.graph.sort()
            model.opset_imports[_MICROSOFT] = 1
        return ir.passes.PassResult(model, modified)
