"""Packed graphs: several sequences of any widths in one call, made of the graphs of the `ort` lowering.

ONNX Runtime's GroupQueryAttention takes one sequence at a time where that is wider than a token. All the rest of a
graph, nearly all of its work, are rows that do not know whose they are. So in a packed graph attention and cache
writes alone are made for each sequence, and everything else once, over exactly the rows that exist.

Before::

    out, key, value = GroupQueryAttention(q, k, v, past_key, past_value, last, total, …)

After, for the sequences s = 0 … S − 1 of the graph::

    out_s, key_s, value_s = GroupQueryAttention(q[rows_s], k[rows_s], v[rows_s], past_key.s, past_value.s, …)
    out = Concat(out_0, …, out_{S−1})[: rows that exist]

The operator takes no sequence of no tokens. So where a call has fewer sequences than the graph, the others get any row
and a small cache that nobody reads; they are the last ones, and what they give is cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain

import numpy as np
import onnx_ir as ir

from dspark_edge.engines.manifest import TensorSpec
from dspark_edge.exporter.tracing import TORCH_DTYPES, GraphContract, Tensors

__all__ = ["pack_drafter", "pack_target"]


def pack_target(model: ir.Model, contract: GraphContract, sequences: int) -> tuple[ir.Model, GraphContract]:
    """A target whose rows are the tokens of several sequences.

    Args:
        model: a traced target of the `ort` lowering; stays as it is.
        contract: of the model.
        sequences: S, most of them in a call.

    Returns:
        The packed graph and its contract: `input_ids` [1, T], one sequence's tokens behind the other's; `widths` [S],
        how many each has, 0 for those behind the last one; `cache_lengths` [S]; `logit_rows` [1, N] of the T tokens;
        each cache of sequence s under its name with `.s` behind it.
    """
    packer = _Packer(model, contract, sequences, axis=1)
    packed = _packed_contract(contract, sequences, TensorSpec("widths", "int64", (sequences,)))
    positions = packer.positions()
    for node in packer.nodes("RotaryEmbedding"):
        node.replace_input_with(3, positions)
    # [1, heads, T, head size]
    packer.replace("TensorScatter", cached=(0,), rows={1: 2}, written=lambda s: {2: packer.start(s)})
    packer.replace("GroupQueryAttention", cached=(3, 4), rows={0: 1, 1: 1, 2: 1}, written=packer.lengths, out=1)
    return packer.finish(packed), packed


def pack_drafter(
    model: ir.Model, contract: GraphContract, sequences: int, block_size: int
) -> tuple[ir.Model, GraphContract]:
    """A drafter for several sequences.

    Args:
        model: a traced drafter of the `ort` lowering; stays as it is.
        contract: of the model.
        sequences: S, most of them in a call.
        block_size: γ.

    Returns:
        The packed graph and its contract: all inputs [B, …] as before, B ≤ S; `cache_lengths` [S]; each cache of
        sequence s under its name with `.s` behind it.
    """
    packer = _Packer(model, contract, sequences, axis=0, block_size=block_size)
    packed = _packed_contract(contract, sequences)
    packer.replace("GroupQueryAttention", cached=(3, 4), rows={0: 0, 1: 0, 2: 0}, written=packer.lengths, out=0)
    return packer.finish(packed), packed


def _packed_contract(contract: GraphContract, sequences: int, *added: TensorSpec) -> GraphContract:
    """A graph's contract for several sequences.

    Args:
        added: inputs that tell tokens of different sequences apart; without, the batch stays what it is.
    """
    cached = {*contract.aliases, *contract.aliases.values()}
    sizes: Mapping[str, int | str] = {"batch": 1, "width": "tokens"} if added else {}

    def shared(specs: Tensors) -> Iterator[TensorSpec]:
        for spec in specs:
            if spec.name == "cache_lengths":
                yield TensorSpec(spec.name, spec.dtype, (sequences,))
            elif spec.name not in cached:
                yield TensorSpec(spec.name, spec.dtype, tuple(sizes.get(str(size), size) for size in spec.shape))

    def of_each(specs: Tensors) -> tuple[TensorSpec, ...]:
        return tuple(
            # Each has a capacity of its own: who is not there needs next to none.
            TensorSpec(
                f"{spec.name}.{s}",
                spec.dtype,
                (1, *(f"capacity_{s}" if size == "capacity" else size for size in spec.shape[1:])),
            )
            for s in range(sequences)
            for spec in specs
            if spec.name in cached
        )

    return GraphContract(
        inputs=(*shared(contract.flat_inputs), *added, of_each(contract.flat_inputs)),
        outputs=(*shared(contract.outputs), *of_each(contract.outputs)),
        aliases={
            f"{output}.{s}": f"{given}.{s}" for s in range(sequences) for output, given in contract.aliases.items()
        },
    )


class _Packer:
    """The graph in the making.

    Args:
        model: is copied.
        contract: of the model.
        sequences: S.
        axis: of the rows in [batch, width, size] that a sequence's are taken from.
        block_size: tokens of every sequence, where they are as many for all.
    """

    def __init__(
        self, model: ir.Model, contract: GraphContract, sequences: int, axis: int, block_size: int | None = None
    ) -> None:
        self._model = model.clone()
        self._graph = self._model.graph
        self._tape = ir.tape.Tape(self._graph)
        self._sequences = range(sequences)
        self._caches = {value.name: value for value in self._graph.inputs if value.name in contract.aliases.values()}
        self._inputs = {value.name: value for value in self._graph.inputs if value.name not in self._caches}
        self._own: dict[str, ir.Value] = {}  # each sequence's caches, given and updated
        self._starts = [self._at("cache_lengths", s) for s in self._sequences]  # [1] each
        first_input = next(iter(self._inputs.values()))
        self._measure_batch(first_input)
        self._count = self._op("Shape", [first_input], start=axis, end=axis + 1)  # [1] rows that exist
        if block_size is None:
            self._given = [self._at("widths", s) for s in self._sequences]
            self._rows, self._widths = self._find_rows()
        else:
            self._given = self._widths = [self._constant([block_size])] * sequences
            last = self._op("Sub", [self._count, self._constant([1])])
            self._rows = [self._op("Min", [self._constant([s]), last]) for s in self._sequences]
        ends = [self._op("Add", pair) for pair in zip(self._starts, self._widths, strict=True)]
        lasts = [self._op("Sub", [end, self._constant([1])]) for end in ends]
        self._lasts = [self._op("Cast", [last], to=ir.DataType.INT32) for last in lasts]
        self._totals = [self._op("Cast", [self._op("Squeeze", [end])], to=ir.DataType.INT32) for end in ends]

    def start(self, s: int) -> ir.Value:
        """[1] int64: what is cached of a sequence."""
        return self._starts[s]

    def lengths(self, s: int) -> Mapping[int, ir.Value]:
        """What GroupQueryAttention takes of a sequence's length: the last valid place [1], and their number []."""
        return {5: self._lasts[s], 6: self._totals[s]}

    def positions(self) -> ir.Value:
        """[1, T] int64 of all tokens."""
        of_each = [
            self._op("Add", [start, self._counted(width)])
            for start, width in zip(self._starts, self._given, strict=True)
        ]
        return self._op("Unsqueeze", [self._op("Concat", of_each, axis=0), self._constant([0])])

    def nodes(self, op_type: str) -> list[ir.Node]:
        return [node for node in self._graph if node.op_type == op_type]

    def replace(
        self,
        op_type: str,
        cached: Sequence[int],
        rows: Mapping[int, int],
        written: Callable[[int], Mapping[int, ir.Value]],
        out: int | None = None,
    ) -> None:
        """Make every node of a type once for each sequence.

        Args:
            cached: inputs that are caches; the last outputs are the same updated.
            rows: input → axis of the rows in it.
            written: inputs that differ by sequence besides.
            out: axis of the rows in the first output; None where all outputs are caches.
        """
        for node in self.nodes(op_type):
            parts = [self._make(node, s, cached, rows, written(s)) for s in self._sequences]
            for place, output in enumerate(node.outputs[-len(cached) :], start=-len(cached)):
                for s, values in enumerate(parts):
                    self._own[f"{output.name}.{s}"] = values[place]
            if out is not None:
                joined = self._op("Concat", [values[0] for values in parts], axis=out)
                result = self._op("Slice", [joined, self._constant([0]), self._count, self._constant([out])])
                result.type = node.outputs[0].type
                node.outputs[0].replace_all_uses_with(result)
            # The old caches are outputs of the graph until `finish` names the new ones.
            self._graph.outputs[:] = [value for value in self._graph.outputs if value not in node.outputs]
            self._graph.remove(node, safe=True)

    def finish(self, contract: GraphContract) -> ir.Model:
        """The model, with inputs and outputs as the contract has them."""
        known = {str(value.name): value for value in (*self._inputs.values(), *self._graph.outputs)} | self._own
        for spec in (*contract.flat_inputs, *contract.outputs):
            value = known[spec.name]
            value.name, value.shape = spec.name, ir.Shape(list(spec.shape))
            value.type = ir.TensorType(ir.tensor_adapters.from_torch_dtype(TORCH_DTYPES[spec.dtype]))
        self._graph.inputs[:] = [known[spec.name] for spec in contract.flat_inputs]
        self._graph.outputs[:] = [known[spec.name] for spec in contract.outputs]
        delivered = {*self._graph.outputs}
        for value in chain.from_iterable(node.outputs for node in self._graph):
            # Shapes in terms of the old inputs mean nothing any more.
            if value not in delivered:
                value.shape = None
        self._graph.sort()
        ir.passes.common.RemoveUnusedNodesPass()(self._model)
        return self._model

    def _make(
        self,
        node: ir.Node,
        s: int,
        cached: Sequence[int],
        rows: Mapping[int, int],
        written: Mapping[int, ir.Value],
    ) -> Sequence[ir.Value]:
        inputs = list(node.inputs)
        for place, axis in rows.items():
            if inputs[place] is not None:
                inputs[place] = self._op("Gather", [inputs[place], self._rows[s]], axis=axis)
        for place in cached:
            name = f"{inputs[place].name}.{s}"
            inputs[place] = self._own.setdefault(name, ir.val(name))
        for place, value in written.items():
            inputs[place] = value
        return self._tape.op_multi_out(
            node.op_type, inputs, node.attributes, num_outputs=len(node.outputs), domain=node.domain
        )

    def _measure_batch(self, first: ir.Value) -> None:
        """Where the size of a batch is read off a cache, read it off the first input."""
        for node in self.nodes("Shape"):
            if node.inputs[0] is not None and node.inputs[0].name in self._caches:
                if (node.attributes.get_int("start", 0), node.attributes.get_int("end", -1)) != (0, 1):
                    raise RuntimeError(f"{node.inputs[0].name}: a size other than the batch is read off a cache")
                node.replace_input_with(0, first)

    def _find_rows(self) -> tuple[list[ir.Value], list[ir.Value]]:
        """Of each sequence: which of the rows are its own, and how many; the last row where it has none."""
        one = self._constant([1])
        last = self._op("Sub", [self._count, one])
        begin, rows, widths = self._constant([0]), [], []
        for given in self._given:
            width = self._op("Max", [given, one])
            rows.append(self._op("Min", [self._op("Add", [begin, self._counted(width)]), last]))
            widths.append(width)
            begin = self._op("Add", [begin, given])
        return rows, widths

    def _counted(self, width: ir.Value) -> ir.Value:
        """0 … width − 1."""
        return self._op("Range", [self._constant(0), self._op("Squeeze", [width]), self._constant(1)])

    def _at(self, name: str, index: int) -> ir.Value:
        """[1]: one number of an input."""
        return self._op("Gather", [self._inputs.setdefault(name, ir.val(name)), self._constant([index])])

    def _constant(self, value: int | list[int]) -> ir.Value:
        name = f"packed.{'scalar' if isinstance(value, int) else 'vector'}.{np.ravel(value)[0]}"
        known = self._graph.initializers.get(name)
        return known or self._tape.initializer(ir.tensor(np.array(value, np.int64), name=name))

    def _op(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: int) -> ir.Value:
        return self._tape.op(op_type, inputs, attributes)
