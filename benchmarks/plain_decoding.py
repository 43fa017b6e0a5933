"""Plain decoding against the bare ONNX Runtime session, and against onnxruntime-genai: same model, same run.

    python benchmarks/plain_decoding.py BUNDLE [--tokens 128] [--repeats 5] [--genai DIR] [--json FILE]

Prints tokens/s as medians over interleaved repeats, and their ratios:

- bare: the target graph at width 1 with everything bound, run again and again; nothing is read back;
- plain and static: `Generator`, greedy; host is its time outside the graphs, a round;
- genai (optional): a model folder of onnxruntime-genai with the same weights, from benchmarks/make_genai.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import sized
from dspark_edge.engines.machine import installed_version, probe_processor
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.runtime import Generator, SamplingParams

PROMPT = "Write a short story about a lighthouse keeper who learns to paint."


class BareSession:
    """The target graph at width 1 behind `length` tokens, and nothing else."""

    def __init__(self, bundle: Bundle, length: int, capacity: int) -> None:
        self.engine = OnnxRuntimeEngine(bundle)
        graph = bundle.manifest.graphs["target"]
        sizes = {"batch": 1, "width": 1, "rows": 1, "capacity": capacity}
        buffers = {
            spec.name: self.engine.allocate(spec.dtype, sized(spec, sizes))
            for spec in (*graph.inputs, graph.outputs[0])
        }
        self.lengths = buffers["cache_lengths"]
        self.call = self.engine.bind("target", buffers)
        self.start = length

    def tokens_per_second(self, tokens: int) -> float:
        started = perf_counter()
        for step in range(tokens):
            self.lengths.write(self.start + step)
            self.call.run()
        return tokens / (perf_counter() - started)


class GenAI:
    """onnxruntime-genai's own generation loop, greedy."""

    def __init__(self, folder: Path, prompt: list[int]) -> None:
        import onnxruntime_genai as genai

        self.genai: Any = genai
        self.model = genai.Model(str(folder))
        self.prompt = prompt

    def tokens_per_second(self, tokens: int) -> float:
        params = self.genai.GeneratorParams(self.model)
        params.set_search_options(max_length=len(self.prompt) + tokens + 1, min_length=len(self.prompt) + tokens + 1)
        generator = self.genai.Generator(self.model, params)
        generator.append_tokens(self.prompt)
        generator.generate_next_token()
        started = perf_counter()
        for _ in range(tokens):
            generator.generate_next_token()
        return tokens / (perf_counter() - started)


def versions() -> dict[str, str]:
    processor = probe_processor(Path("/"))
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": f"{processor.model}, {processor.usable_cores} cores",
    }
    packages = ("dspark-edge", "onnxruntime", "onnxruntime-genai", "numpy")
    return found | {name: version for name in packages if (version := installed_version(name))}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    bundle = Bundle.open(arguments.bundle)
    greedy = SamplingParams(max_new_tokens=arguments.tokens + 1, ignore_eos=True)
    host: dict[str, list[float]] = {"plain": [], "static": []}
    with (
        Generator.open(arguments.bundle, mode="plain") as plain,
        Generator.open(arguments.bundle, mode="static") as static,
    ):
        prompt = plain.encode(PROMPT) if plain.tokenizer else list(range(1, 33))
        capacity = plain.capacity if bundle.manifest.lowering != "ort" else 512

        def ours(name: str, generator: Generator) -> Callable[[int], float]:
            def run(tokens: int) -> float:
                statistics = generator.generate(prompt, greedy).statistics
                host[name].append(statistics.host_s / statistics.rounds)
                return statistics.tokens_per_second

            return run

        runs: dict[str, Callable[[int], float]] = {
            "bare": BareSession(bundle, len(prompt), capacity).tokens_per_second,
            "plain": ours("plain", plain),
            "static": ours("static", static),
        }
        if arguments.genai:
            runs["genai"] = GenAI(arguments.genai, prompt).tokens_per_second
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(arguments.repeats + 1):  # the first warms up
            for name, run in runs.items():
                speed = run(arguments.tokens)
                if repeat:
                    speeds[name].append(speed)
        return {
            "date": date.today().isoformat(),
            "versions": versions(),
            "threads": OnnxRuntimeEngine(bundle).threads,
            "tokens_per_second": {name: median(values) for name, values in speeds.items()},
            "spread": {name: [min(values), max(values)] for name, values in speeds.items()},
            "ratio_to_plain": {
                name: median(p / v for p, v in zip(speeds["plain"], values, strict=True))
                for name, values in speeds.items()
            },
            "host_ms_a_round": {name: 1e3 * median(values) for name, values in host.items()},
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--genai", type=Path, help="a model folder of onnxruntime-genai")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    arguments = parser.parse_args()
    result = measure(arguments)
    for name, speed in result["tokens_per_second"].items():
        low, high = result["spread"][name]
        ratio = result["ratio_to_plain"][name]
        print(f"{name:7} {speed:7.1f} tokens/s  ({low:.1f} to {high:.1f})   plain is {ratio:.2f}x of it")
    for name, host in result["host_ms_a_round"].items():
        print(f"host    {host:7.3f} ms a round in {name} mode")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
