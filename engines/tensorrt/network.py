"""A graph of a bundle as a TensorRT network, checked against its contract."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspark_edge.engines.errors import EngineError
from dspark_edge.engines.manifest import GraphSpec
from dspark_edge.engines.tensorrt.flavour import Flavour, make_network
from dspark_edge.engines.tensorrt.profiles import ShapeProfile, top_k_values

__all__ = ["GraphNetwork", "parse_graph"]

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}


@dataclass(frozen=True, slots=True)
class GraphNetwork:
    """A parsed network. `builder` and `parser` own what it points to, and live as long as it does."""

    flavour: Flavour
    role: str
    graph: GraphSpec
    builder: Any
    parser: Any
    network: Any

    @property
    def inputs(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in map(self.network.get_input, range(self.network.num_inputs))}

    @property
    def outputs(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in map(self.network.get_output, range(self.network.num_outputs))}

    def decompose_attention(self) -> int:
        """Allow attention to be built of single operators; how many there are."""
        count = 0
        for layer in self._layers("ATTENTION_INPUT", "IAttentionInputLayer"):
            layer.attention.decomposable = True
            count += 1
        return count

    def free_weights(self, names: Collection[str]) -> tuple[str, ...]:
        """Make inputs of constants, which then have the constants' names.

        Args:
            names: of the constants; what is not one of the network's is left out.

        Returns:
            The names of the inputs.
        """
        freed: dict[str, Any] = {}  # name of a constant's tensor → the input that stands for it
        inputs = []
        for layer in self._layers("CONSTANT", "IConstantLayer"):
            if layer.name in names:
                tensor = layer.get_output(0)
                freed[tensor.name] = self.network.add_input(layer.name, tensor.dtype, tensor.shape)
                inputs.append(layer.name)
        for layer in map(self.network.get_layer, range(self.network.num_layers)):
            for index in range(layer.num_inputs):
                tensor = layer.get_input(index)
                if tensor is not None and tensor.name in freed:
                    layer.set_input(index, freed[tensor.name])
        return tuple(inputs)

    def cache_updates(self) -> dict[str, str]:
        """Output → input of all caches that a layer updates in place: both have one address when the engine runs."""
        return {
            layer.get_output(0).name: layer.get_input(0).name
            for layer in self._layers("KV_CACHE_UPDATE", "IKVCacheUpdateLayer")
        }

    def check(self) -> None:
        """See that inputs, outputs and caches are those of the manifest.

        Raises:
            EngineError: they are not: the file is another graph, or this TensorRT reads it differently.
        """
        for kind, tensors, specs in (
            ("input", self.inputs, self.graph.inputs),
            ("output", self.outputs, self.graph.outputs),
        ):
            expected = {spec.name: spec for spec in specs}
            if tensors.keys() != expected.keys():
                odd = ", ".join(sorted(tensors.keys() ^ expected.keys()))
                raise EngineError(
                    f"{self.role}: TensorRT and the manifest differ in the {kind}s {odd}; export it again"
                )
            for name, spec in expected.items():
                dtype = _DTYPES.get(str(tensors[name].dtype).rsplit(".", 1)[-1])
                if dtype != spec.dtype:
                    raise EngineError(f"{self.role}: {name} is {dtype} to TensorRT, expected {spec.dtype}")
                if kind == "input" and self._differs(tuple(tensors[name].shape), spec.shape):
                    raise EngineError(
                        f"{self.role}: {name} is {list(tensors[name].shape)} to TensorRT, expected {list(spec.shape)}"
                    )
        updates = self.cache_updates()
        if updates and updates != dict(self.graph.aliases):
            output, given = min({*updates.items()} ^ {*self.graph.aliases.items()})
            raise EngineError(f"{self.role}: {output} and {given} are one buffer to TensorRT or the manifest alone")

    def add_profile(self, config: Any, profile: ShapeProfile, vocab_size: int) -> None:
        """Add an optimisation profile to a builder's configuration.

        Raises:
            EngineError: TensorRT refuses it.
        """
        added = self.builder.create_optimization_profile()
        inputs = self.inputs
        for spec in self.graph.inputs:
            if inputs[spec.name].is_shape_tensor:
                added.set_shape_input(spec.name, *([value] for value in top_k_values(vocab_size)))
            elif any(isinstance(size, str) for size in spec.shape):
                added.set_shape(spec.name, *profile.shapes(spec))
        if config.add_optimization_profile(added) < 0:
            raise EngineError(f"{self.role}: TensorRT refuses the optimisation profile {profile.name!r}")

    def _layers(self, kind: str, interface: str) -> Iterator[Any]:
        """Layers of a kind. The parser hands out some as plain layers, which have to be told what they are."""
        trt = self.flavour.trt
        wanted = getattr(trt.LayerType, kind, None)
        if wanted is None:
            return
        for layer in map(self.network.get_layer, range(self.network.num_layers)):
            if layer.type == wanted:
                layer.__class__ = getattr(trt, interface)
                yield layer

    @staticmethod
    def _differs(found: tuple[int, ...], expected: tuple[int | str, ...]) -> bool:
        pairs = zip(found, expected, strict=False)
        return len(found) != len(expected) or any(
            size != (-1 if isinstance(wanted, str) else wanted) for size, wanted in pairs
        )


def parse_graph(flavour: Flavour, logger: Any, role: str, graph: GraphSpec, path: Path) -> GraphNetwork:
    """Read an ONNX file, weights included.

    Raises:
        EngineError: TensorRT cannot read it.
    """
    trt = flavour.trt
    builder = trt.Builder(logger)
    network = make_network(flavour, builder)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        problems = "; ".join(str(parser.get_error(index).desc()) for index in range(min(3, parser.num_errors)))
        raise EngineError(f"{role}: {flavour.backend} {flavour.version} cannot read {path.name}: {problems}")
    return GraphNetwork(flavour, role, graph, builder, parser, network)
