"""Tracing: a torch module without weights → an ONNX graph that follows a contract.

Modules are built and exported under fake tensors, so a graph costs the same memory whatever the size of its weights;
these are streamed in afterwards (see `dspark_edge.exporter.streaming`).
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes import common as common_passes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dspark_edge.engines.engine import sized
from dspark_edge.engines.manifest import TensorSpec
from dspark_edge.exporter.lowerings import Lowering

__all__ = ["TORCH_DTYPES", "GraphContract", "Tensors", "trace"]

# The newest IR version that ONNX Runtime releases of the last year read.
_IR_VERSION = 10

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}

# Example sizes for tracing: distinct and above 1, so that no two symbolic dimensions are taken for one.
_EXAMPLE_SIZES = {"batch": 2, "width": 3, "rows": 5, "block": 6, "candidates": 7, "capacity": 11}

Tensors = tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class GraphContract:
    """Names, types and shapes of a graph's inputs and outputs, in the order of the module's arguments and results."""

    inputs: tuple[TensorSpec | Tensors, ...]  # a nested tuple is one list argument
    outputs: Tensors
    aliases: Mapping[str, str]  # output → input that shares its buffer

    @property
    def flat_inputs(self) -> Tensors:
        flat: list[TensorSpec] = []
        for entry in self.inputs:
            flat.extend([entry] if isinstance(entry, TensorSpec) else entry)
        return tuple(flat)


def _example(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(sized(spec, _EXAMPLE_SIZES), dtype=TORCH_DTYPES[spec.dtype])


def _map_inputs(contract: GraphContract, convert: Callable[[TensorSpec], Any]) -> tuple[Any, ...]:
    return tuple(
        convert(entry) if isinstance(entry, TensorSpec) else [convert(spec) for spec in entry]
        for entry in contract.inputs
    )


@contextmanager
def _quiet() -> Any:
    """Keep the exporter's chatter (absent torchvision, parameters without data) away from users."""
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_dimensions(graph: ir.Graph, contract: GraphContract) -> None:
    """Give torch's symbols (s14, s27, …) the contract's names, inputs and outputs theirs."""
    inputs, outputs = contract.flat_inputs, contract.outputs
    if len(graph.inputs) != len(inputs) or len(graph.outputs) != len(outputs):
        raise RuntimeError(
            f"traced graph has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, "
            f"its contract {len(inputs)} and {len(outputs)}"
        )
    symbols: dict[str, str] = {}
    for value, spec in zip(graph.inputs, inputs, strict=True):
        if value.shape is None:
            raise RuntimeError(f"traced input {value.name} has no shape")
        for given, named in zip(value.shape, spec.shape, strict=True):
            if isinstance(named, str):
                symbols[str(given)] = named
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, symbols)) + r")\b") if symbols else None
    for node in graph:
        for value in node.outputs:
            if value.shape is not None and pattern is not None:
                value.shape = ir.Shape(
                    [d if isinstance(d, int) else pattern.sub(lambda m: symbols[m[1]], str(d)) for d in value.shape]
                )
    for value, spec in [*zip(graph.inputs, inputs, strict=True), *zip(graph.outputs, outputs, strict=True)]:
        value.name = spec.name
        value.shape = ir.Shape(list(spec.shape))


def trace(
    build: Callable[[], nn.Module], contract: GraphContract, lowering: Lowering, opset: int | None = None
) -> ir.Model:
    """Export the module that `build` makes to ONNX, without weights.

    Args:
        build: makes the module; called under fake tensors.
        contract: what the graph takes and gives.
        lowering: how the custom operators are written.
        opset: of the default domain; None takes the lowering's.

    Returns:
        The model; parameters are initializers under their module names, without data.
    """
    used = {size for spec in contract.flat_inputs for size in spec.shape if isinstance(size, str)}
    dimensions = {name: torch.export.Dim(name, min=1) for name in used}

    def dynamic(spec: TensorSpec) -> dict[int, Any]:
        return {axis: dimensions[size] for axis, size in enumerate(spec.shape) if isinstance(size, str)}

    with _quiet():
        with FakeTensorMode():
            program = torch.export.export(
                build(),
                _map_inputs(contract, _example),
                dynamic_shapes=_map_inputs(contract, dynamic),
                strict=False,
            )
        # torch.onnx would decompose it into core operators first, and trace it once more for that: 40 % of the time.
        # All that the modules use has a translation as it is; what has none is an error, not another graph.
        program.run_decompositions = lambda *_: program  # type: ignore[method-assign]
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset or lowering.opset,
            custom_translation_table=dict(lowering.translations),
            optimize=False,  # it would read the weights, and there are none
            verbose=False,
        )
    if exported is None:
        raise RuntimeError("torch.onnx.export gave no program")
    model: ir.Model = exported.model
    for initializer in model.graph.initializers.values():
        initializer.const_value = None
    with _quiet():
        onnxscript.optimizer.optimize_ir(model)
    _name_dimensions(model.graph, contract)
    # Every layer derives the same positions and masks from cache_lengths; one of each is enough.
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)
    for rewrite in lowering.rewrites:
        rewrite()(model)
    common_passes.RemoveUnusedNodesPass()(model)
    model.ir_version = _IR_VERSION
    model.producer_name = "dspark-edge"
    model.producer_version = None
    model.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()  # torch's stack traces name paths of the exporting machine
    return model


def graph_opsets(models: Sequence[ir.Model]) -> dict[str, int]:
    """The operator sets that a bundle's graphs ask for, by domain."""
    opsets: dict[str, int] = {}
    for model in models:
        for domain, version in model.opset_imports.items():
            opsets[domain] = max(version, opsets.get(domain, 0))
    return opsets
