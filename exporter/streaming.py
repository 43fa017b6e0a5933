"""Weights on their way from checkpoint to bundle: one tensor in memory at a time.

Each graph gets one `.data` file; a parameter that an earlier graph has already written (the embedding and head that
the drafter shares with its target) is referenced there instead of written again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
import torch

from dspark_edge.engines.bundle_writer import BundleWriter
from dspark_edge.engines.manifest import SharedWeight
from dspark_edge.exporter.weights import Source

__all__ = ["WeightStreamer", "bytes_to_write", "shared_weights"]

# Readers map external data into memory, and want large tensors on page boundaries.
_PAGE = 4096
_ALIGNMENT = 64
_TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT4: torch.uint8,  # two in a byte
}


def _size(value: ir.Value) -> int:
    """Bytes of an initializer."""
    if value.shape is None or value.dtype is None:
        raise RuntimeError(f"initializer {value.name} has no shape or type")
    return math.ceil(math.prod(int(size) for size in value.shape) * value.dtype.itemsize)


def bytes_to_write(model: ir.Model, sources: Mapping[str, Source]) -> int:
    """Bytes of the parameters that a graph takes from its sources."""
    return sum(_size(value) for name, value in model.graph.initializers.items() if name in sources)


def shared_weights(models: Mapping[str, ir.Model], vocab_size: int) -> tuple[SharedWeight, ...]:
    """Embedding and head, where more than one graph has them. Their weights must have been written.

    Args:
        models: role → graph.
        vocab_size: rows of the matrices that are meant.
    """
    found: dict[tuple[str, int, int], dict[str, list[str]]] = {}
    for role, model in models.items():
        for tensor in _external(model):
            if len(tensor.shape) == 2 and tensor.shape[0] == vocab_size:
                place = (str(tensor.location), tensor.offset or 0, tensor.length or 0)
                found.setdefault(place, {}).setdefault(role, []).append(str(tensor.name))
    return tuple(
        SharedWeight(*place, {role: tuple(names) for role, names in roles.items()})
        for place, roles in found.items()
        if len(roles) > 1
    )


def _external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value


@dataclass
class WeightStreamer:
    """Writes the parameters of several graphs into a bundle, each once.

    Args:
        writer: the bundle in the making.
        report: called with the number of bytes done after every parameter.
    """

    writer: BundleWriter
    report: Callable[[int], None] = lambda done: None
    _written: dict[tuple[Source, ir.DataType], ir.ExternalTensor] = field(default_factory=dict)

    def write(self, file: str, model: ir.Model, sources: Mapping[str, Source]) -> None:
        """Write `file` (ONNX) and its data file.

        Raises:
            CheckpointError: a source cannot be read.
            BundleError: a file cannot be written.
        """
        location = f"{file}.data"
        with self.writer.open_stream(location) as stream:
            for name, value in model.graph.initializers.items():
                if name not in sources:
                    continue
                size = _size(value)
                key = (sources[name], ir.DataType(value.dtype))
                known = self._written.get(key)
                if known is None:
                    alignment = _PAGE if size >= _PAGE else _ALIGNMENT
                    stream.write(bytes(-stream.tell() % alignment))
                    known = self._reference(value, location, stream.tell(), size)
                    self._written[key] = known
                    data = sources[name].load(_TORCH_DTYPES[key[1]])
                    stream.write(memoryview(data.reshape(-1).view(torch.uint8).numpy()))
                    del data
                value.const_value = self._reference(value, known.location, known.offset or 0, size)
                self.report(size)
        self.writer.write_bytes(file, ir.to_proto(model).SerializeToString())

    def _reference(self, value: ir.Value, location: object, offset: int, size: int) -> ir.ExternalTensor:
        return ir.ExternalTensor(
            str(location),
            offset,
            size,
            ir.DataType(value.dtype),
            shape=ir.Shape(list(value.shape or ())),
            name=str(value.name),
            base_dir=str(self.writer.path),
        )
