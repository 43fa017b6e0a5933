"""A bundle's graphs, one call at a time: for checking them, not for speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dspark_edge.engines.engine import Buffer, Engine, HostArray, sized

__all__ = ["GraphRunner"]


class GraphRunner:
    """A bundle's graphs on an engine, with caches; every call binds anew.

    Args:
        engine: runs the graphs.
        capacity: cache slots where the bundle leaves that open; a bundle with a static capacity keeps its own.
        batch: sequences.
    """

    def __init__(self, engine: Engine, capacity: int, batch: int = 1) -> None:
        self.engine = engine
        self.lengths: HostArray = np.zeros(batch, np.int64)
        self.caches: dict[str, Buffer] = {}
        graphs = engine.bundle.manifest.graphs
        for graph in (graphs[role] for role in ("target", "drafter") if role in graphs):
            for name in graph.aliases.values():
                spec = next(spec for spec in graph.inputs if spec.name == name)
                if name not in self.caches:
                    shape = sized(spec, {"batch": batch, "capacity": capacity})
                    self.caches[name] = engine.allocate(spec.dtype, shape)

    def run(self, role: str, inputs: Mapping[str, Any]) -> dict[str, HostArray]:
        """Run a graph on these inputs and the caches; copies of all outputs that are no caches, by name.

        Raises:
            EngineError: an input is missing or does not fit, or the engine fails.
        """
        graph = self.engine.bundle.manifest.graphs[role]
        buffers: dict[str, Buffer] = {}
        sizes: dict[str, int] = {}
        for spec in graph.inputs:
            if spec.name in self.caches:
                buffers[spec.name] = self.caches[spec.name]
            elif spec.name in inputs:
                values = np.asarray(inputs[spec.name])
                buffers[spec.name] = self.engine.allocate(spec.dtype, values.shape)
                buffers[spec.name].write(values)
                sizes.update({str(name): size for name, size in zip(spec.shape, values.shape, strict=False)})
        outputs = [spec for spec in graph.outputs if spec.name not in graph.aliases]
        for spec in outputs:
            buffers[spec.name] = self.engine.allocate(spec.dtype, sized(spec, sizes))
        self.engine.bind(role, buffers).run()
        return {spec.name: np.array(buffers[spec.name].read()) for spec in outputs}

    def run_packed(self, role: str, inputs: Mapping[str, Any]) -> dict[str, HostArray]:
        """Run a packed graph on copies of the first sequence's caches, one for each of its sequences."""
        graph = self.engine.bundle.manifest.graphs[role]
        copies = {
            spec.name: self.caches[name].read()[:1]
            for spec in graph.inputs
            if (name := spec.name.rpartition(".")[0]) in self.caches
        }
        return self.run(role, {**inputs, **copies})

    def extend(self, token_ids: HostArray) -> HostArray:
        """Run the target on token_ids [B, W] behind the valid part of the caches: logits of all rows [B, W, V].

        In several calls, where the engine gives fewer rows at once.
        """
        most = self.engine.most_rows
        if most is not None and token_ids.shape[1] > most:
            pieces = [token_ids[:, begin : begin + most] for begin in range(0, token_ids.shape[1], most)]
            return np.concatenate([self.extend(piece) for piece in pieces], axis=1)
        batch, width = token_ids.shape
        rows = np.broadcast_to(np.arange(width), (batch, width))
        inputs = {"input_ids": token_ids, "cache_lengths": self.lengths, "logit_rows": rows}
        logits = self.run("target", inputs)["logits"]
        self.lengths = self.lengths + width
        return logits

    def draft(
        self, anchor_ids: HostArray, temperature: float, noise: HostArray, role: str = "drafter"
    ) -> dict[str, HostArray]:
        """Draft behind anchors [B] with noise [B, γ, K]; the caches stay valid up to the same lengths.

        Args:
            role: "drafter", or "drafter_short" for its shorter block.
        """
        inputs = {
            "anchor_ids": anchor_ids,
            "cache_lengths": self.lengths,
            "temperature": np.full(len(anchor_ids), temperature, np.float32),
            "noise": noise,
        }
        return self.run(role, inputs)
