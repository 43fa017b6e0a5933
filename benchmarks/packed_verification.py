"""What verifying packed tokens brings where many requests decode: measured, on packed graphs made of the bundle's own.

    python benchmarks/packed_verification.py BUNDLE [--survival 0.59 0.37 0.24 ...] [--context 256] [--json FILE]

Packed verification runs everything but attention on the Σ(1 + ℓ) tokens that exist, where a dense call pads every
request to the widest and the `ort` lowering makes a call for each. `packing.py` rewrites the bundle's target and
drafter so that they take several sequences; for each batch are timed, one after the other and again and again:

- plain: one token of each request, in the call that the runtime makes of it;
- packed: 1 … γ + 1 tokens of each request in one packed call;
- draft: one packed call of the drafter for all.

And from the chances that drafts survive, by position, in tokens a second by those of plain decoding:

- fixed: the best fixed number of draft tokens, with acceptance and drafting;
- foreseen: exactly those draft tokens are verified that will be accepted, which no scheduler can do better.

Packing pays where `fixed` clearly exceeds 1. It needs a bundle of the lowering `ort` with a trained drafter.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from packing import pack_drafter, pack_target

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import NUMPY_DTYPES, sized
from dspark_edge.engines.errors import DSparkError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.exporter.tracing import GraphContract
from dspark_edge.runtime.batching.probe import BatchProbe
from dspark_edge.runtime.reporting.circumstances import machine_facts, versions_of

BATCHES = (1, 2, 4, 8)
# Chances that the first k drafts are accepted: SmolLM2's drafter on math, greedy.
SURVIVALS = (0.59, 0.37, 0.24, 0.13, 0.07, 0.05, 0.03)
Run = Callable[[], object]


class PackedGraphs:
    """A bundle's target and drafter for several sequences, at a fixed number of cached tokens.

    Args:
        bundle: of the lowering `ort`, with a drafter.
        sequences: S, most of a call.
        context: cached tokens of each.
        threads: of the sessions; None: all cores.
    """

    def __init__(self, bundle: Bundle, sequences: int, context: int, threads: int | None) -> None:
        self._folder, self._sequences, self._context = bundle.path, sequences, context
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = threads or 0
        self._options.add_session_config_entry("session.force_spinning_stop", "1")
        # The graphs are in memory, their weights where the bundle has them.
        self._options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
        graphs, block = bundle.manifest.graphs, bundle.manifest.drafter.block_size
        contracts = {
            role: GraphContract(graphs[role].inputs, graphs[role].outputs, graphs[role].aliases)
            for role in ("target", "drafter")
        }
        models = {role: ir.load(str(bundle.graph_path(role))) for role in contracts}
        self._target = self._load(*pack_target(models["target"], contracts["target"], sequences))
        self._drafter = self._load(*pack_drafter(models["drafter"], contracts["drafter"], sequences, block))
        # A row for each sequence, and one that those which a call lacks may write to.
        self._caches: dict[str, np.ndarray] = {}
        for contract in contracts.values():
            for spec in contract.flat_inputs:
                if spec.name in contract.aliases.values() and spec.name not in self._caches:
                    shape = sized(spec, {"batch": sequences + 1, "capacity": context + 16})
                    noise = np.random.default_rng(0).standard_normal(shape).astype(NUMPY_DTYPES[spec.dtype])
                    self._caches[spec.name] = noise
        self._kept: list[Any] = []  # what bindings point to

    def target(self, widths: list[int]) -> Run:
        """A target call of so many tokens of each sequence."""
        tokens, first = sum(widths), np.cumsum([0, *widths])
        given = {
            "input_ids": np.ones((1, tokens), np.int64),
            "logit_rows": np.arange(tokens)[None],
            "order": np.arange(tokens),
        }
        rows = [np.arange(first[s], first[s + 1]) for s in range(len(widths))]
        return self._bind(self._target, given, rows, {"tokens": tokens, "rows": tokens}, len(widths))

    def drafter(self, batch: int) -> Run:
        """A greedy block for each of so many sequences."""
        contract = self._drafter[1]
        free = {"anchor_ids", "temperature", "noise"}
        given = {
            spec.name: np.zeros(sized(spec, {"batch": batch}), NUMPY_DTYPES[spec.dtype])
            for spec in contract.flat_inputs
            if spec.name in free
        }
        rows = [np.array([s]) for s in range(batch)]
        return self._bind(self._drafter, {**given, "order": np.arange(batch)}, rows, {"batch": batch}, batch)

    def _load(self, model: ir.Model, contract: GraphContract) -> tuple[Any, GraphContract]:
        graph = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(graph, self._options, providers=["CPUExecutionProvider"]), contract

    def _bind(
        self,
        graph: tuple[Any, GraphContract],
        given: Mapping[str, np.ndarray],
        rows: list[np.ndarray],
        sizes: dict[str, int],
        batch: int,
    ) -> Run:
        session, contract = graph
        lengths = np.array([self._context] * batch + [0] * (self._sequences - batch))
        arrays = {**given, "cache_lengths": lengths}
        for s in range(self._sequences):
            arrays[f"rows.{s}"] = rows[s] if s < batch else np.array([0])
            for name, cache in self._caches.items():
                row = s if s < batch else self._sequences
                arrays[f"{name}.{s}"] = cache[row : row + 1]
        for spec in contract.outputs:
            if spec.name not in contract.aliases and spec.name != "base_logits":
                arrays[spec.name] = np.zeros(sized(spec, sizes), NUMPY_DTYPES[spec.dtype])
        values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
        self._kept.append((arrays, values))
        binding = session.io_binding()
        for spec in contract.flat_inputs:
            binding.bind_ortvalue_input(spec.name, values[spec.name])
        for spec in contract.outputs:
            source = contract.aliases.get(spec.name, spec.name)
            if source in values:
                binding.bind_ortvalue_output(spec.name, values[source])
        return lambda: session.run_with_iobinding(binding)


def measure(arguments: argparse.Namespace) -> dict[str, dict[int, Any]]:
    """Seconds of plain steps, of drafts and of the samplers by batch, and of packed calls by batch and width."""
    bundle = Bundle.open(arguments.bundle)
    widths = range(1, bundle.manifest.drafter.block_size + 2)
    packed = PackedGraphs(bundle, max(BATCHES), arguments.context, arguments.threads)
    targets = {(batch, width): packed.target([width] * batch) for batch in BATCHES for width in widths}
    drafters = {batch: packed.drafter(batch) for batch in BATCHES}
    times: dict[Any, list[float]] = {}

    def time(name: Any, run: Run) -> None:
        started = perf_counter()
        run()
        times.setdefault(name, []).append(perf_counter() - started)

    with OnnxRuntimeEngine(bundle, "cpu", arguments.threads) as engine:
        probes = {batch: BatchProbe(engine, batch, arguments.context + 2) for batch in BATCHES}
        for _ in range(arguments.sweeps + 1):  # the first one warms up
            for batch in BATCHES:
                plain = probes[batch].run(arguments.context, 1, "sampler_greedy")
                times.setdefault(("plain", batch), []).append(plain.target_s)
                times.setdefault(("sampler", batch), []).append(plain.sampler_s)
                time(("draft", batch), drafters[batch])
                for width in widths:
                    time((batch, width), targets[batch, width])
    found = {name: median(values[1:]) for name, values in times.items()}
    return {
        "plain": {batch: found["plain", batch] for batch in BATCHES},
        "sampler": {batch: found["sampler", batch] for batch in BATCHES},
        "draft": {batch: found["draft", batch] for batch in BATCHES},
        "packed": {batch: {width: found[batch, width] for width in widths} for batch in BATCHES},
    }


def summarise(times: Mapping[str, Mapping[int, Any]], survivals: list[float]) -> list[dict[str, float]]:
    """What packing brings for each batch, by tokens a second of plain decoding."""
    rows = []
    tau = 1 + sum(survivals)
    for batch in times["plain"]:
        plain_s = times["plain"][batch] + times["sampler"][batch]
        by_length = [
            _tokens_per_second(times, batch, 1 + length, 1 + sum(survivals[:length])) * plain_s / batch
            for length in range(1, len(survivals) + 1)
        ]
        best = max(range(len(by_length)), key=by_length.__getitem__)
        rows.append(
            {
                "batch": batch,
                "plain_tokens_per_second": batch / plain_s,
                "plain_packed": plain_s / (times["packed"][batch][1] + times["sampler"][batch]),
                "fixed": by_length[best],
                "fixed_length": 1 + best,
                "foreseen": _tokens_per_second(times, batch, tau, tau) * plain_s / batch,
            }
        )
    return rows


def _tokens_per_second(times: Mapping[str, Mapping[int, Any]], batch: int, width: float, tokens: float) -> float:
    """Of rounds that verify `width` tokens of each request and commit `tokens` of them."""
    by_width = times["packed"][batch]
    target_s = float(np.interp(width, [*by_width], [*by_width.values()]))
    # Acceptance costs by the rows that are judged.
    return float(batch * tokens / (times["draft"][batch] + target_s + width * times["sampler"][batch]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--survival", type=float, nargs="+", default=list(SURVIVALS))
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--sweeps", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the result here, too")
    arguments = parser.parse_args()
    try:
        times = measure(arguments)
    except DSparkError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    for batch in BATCHES:
        packed = "  ".join(f"{width}: {1e3 * cost:.1f}" for width, cost in times["packed"][batch].items())
        print(
            f"batch {batch}, ms: plain {1e3 * times['plain'][batch]:.1f}, draft {1e3 * times['draft'][batch]:.1f}, "
            f"packed by width {packed}"
        )
    rows = summarise(times, arguments.survival)
    for row in rows:
        print(
            f"batch {row['batch']}: plain {row['plain_tokens_per_second']:.1f} tokens/s (in a packed call "
            f"{row['plain_packed']:.2f}x); {row['fixed_length']} drafts each {row['fixed']:.2f}x, were all foreseen "
            f"{row['foreseen']:.2f}x"
        )
    if arguments.json:
        result = {
            "machine": machine_facts(),
            "versions": versions_of(("dspark-edge", "onnxruntime", "numpy")),
            "survivals": arguments.survival,
            "context": arguments.context,
            "seconds": times,
            "batches": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
