"""Lowerings: which ONNX operators stand for the custom torch operators of the modules.

A lowering is chosen at export by where the graph will run:

- ``ort``: ONNX Runtime's own GroupQueryAttention; fastest on CPU, one stream.
- ``onnx``: standard opset-24 TensorScatter and Attention; TensorRT ≥ 10.15, ONNX Runtime CUDA, batches on CPU.
- ``decomposed``: opset 18 and nothing newer; TensorRT 10.3 (JetPack 6) and other old runtimes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import onnx_ir as ir

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.manifest import Precision

__all__ = ["LOWERINGS", "Lowering", "get_lowering"]

LOWERINGS = ("ort", "onnx", "decomposed")


@dataclass(frozen=True, slots=True)
class Lowering:
    """One way to write the custom operators."""

    name: str
    opset: int  # of the default domain
    context_opset: int  # the same where a target writes a drafter's context beside its own caches
    translations: Mapping[Callable[..., Any], Callable[..., Any]]  # torch operator overload → onnxscript function
    dynamic_capacity: bool  # whether the cache capacity may be a symbolic dimension
    batched: bool  # whether a batch of more than one may be wider than one token
    low_bit: tuple[Precision, ...] = ()  # quantized precisions that it has operators for
    rewrites: tuple[Callable[[], ir.passes.InPlacePass], ...] = ()  # passes that finish a traced graph
    packs: bool = False  # whether several sequences of any widths take graphs of their own, see `packing`


def get_lowering(name: str) -> Lowering:
    """Look a lowering up by name.

    Raises:
        InvalidInputError: the name is unknown.
    """
    if name not in LOWERINGS:
        raise InvalidInputError(f"unknown lowering {name!r}; choose one of: {', '.join(LOWERINGS)}")
    lowering: Lowering = import_module(f"dspark_edge.exporter.lowerings.{name}").LOWERING
    return lowering
