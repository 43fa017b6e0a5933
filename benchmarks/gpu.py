"""What calls and rounds cost on a GPU, against its memory's bandwidth and against torch: all of it in one run.

    python benchmarks/gpu.py BUNDLE [--engine tensorrt-rtx] [--context 256] [--tokens 128] [--repeats 5]
                             [--torch TARGET] [--json FILE.json] [--picture FILE.png]

BUNDLE has engines built for this GPU (`dspark-edge build`). Measured, as medians:

- the bandwidth that copies within the device reach, and how much of it plain decoding of one sequence uses: all weights
  and the valid part of the cache, read once a token;
- the device's time of each call (captured, between two events): the target by width, the drafter, the greedy sampler;
- whole rounds with γ drafts verified: wall time, the device's time of their calls, and the rest, which is the host's;
- tokens/s of the modes (`scheduled` where the bundle has been profiled with this engine), interleaved, same prompts;
- with --torch, the target alone in torch on this GPU, eager and compiled, in the precision of the bundle's
  activations.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Buffer, sized
from dspark_edge.engines.errors import DSparkError
from dspark_edge.engines.machine import probe_nvidia_driver
from dspark_edge.engines.opening import EngineChoice
from dspark_edge.engines.profile import Profile
from dspark_edge.engines.tensorrt.cuda import Stream
from dspark_edge.engines.tensorrt.engine import TensorRTEngine
from dspark_edge.runtime.generator import Generator, GeneratorOptions
from dspark_edge.runtime.profile_probe import EngineView, StreamProbe
from dspark_edge.runtime.reporting.circumstances import versions_of
from dspark_edge.runtime.sampling import SamplingParams
from dspark_edge.runtime.scheduled_policy import StreamScheduling

PROMPTS = (
    "A shop sells pens at 3 dollars and books at 12. Tom buys 4 pens and 2 books. How much does he pay?",
    "Write a function that returns the longest word of a text.",
    "Explain in simple words why the sky is blue.",
)
PACKAGES = ("dspark-edge", "tensorrt", "tensorrt-rtx-cu13", "cuda-python", "onnxruntime-gpu", "torch", "numpy")
_COPY = 256 << 20  # bytes
_WARM_UP = 4


def repeated(measure: Callable[[], float], repeats: int) -> float:
    """The median of a measurement, the first few left out."""
    return median([measure() for _ in range(_WARM_UP + repeats)][_WARM_UP:])


def device_time(stream: Stream, work: Callable[[], Any]) -> float:
    """The device's seconds of what is put into the stream."""
    begun = stream.mark()
    work()
    return stream.elapsed_s(begun, stream.mark())


def wall_time(work: Callable[[], Any]) -> float:
    begun = perf_counter()
    work()
    return perf_counter() - begun


def bandwidth(engine: TensorRTEngine, repeats: int) -> float:
    """Bytes a second that a copy within the device reads and writes together."""
    cuda, stream = engine.cuda, engine.stream
    first, second = (cuda.allocate(_COPY, "a copy") for _ in range(2))
    seconds = repeated(lambda: device_time(stream, lambda: stream.on_device(second, first, _COPY)), repeats)
    for pointer in (first, second):
        cuda.free(pointer)
    return 2 * _COPY / seconds


def call_time(engine: TensorRTEngine, role: str, sizes: dict[str, int], context: int, repeats: int) -> float:
    """The device's seconds of one captured call."""
    graph = engine.bundle.manifest.graphs[role]
    buffers: dict[str, Buffer] = {
        spec.name: engine.allocate(spec.dtype, sized(spec, sizes))
        for spec in (*graph.inputs, *graph.outputs)
        if spec.name not in graph.aliases and spec.name != "base_logits"
    }
    if "cache_lengths" in buffers:
        buffers["cache_lengths"].write(context)
    if "logit_rows" in buffers:
        buffers["logit_rows"].write(np.arange(sizes["width"])[None])
    call = engine.bind(role, buffers)
    return repeated(lambda: device_time(engine.stream, call.run), repeats)


def read_a_token(bundle: Bundle, context: int) -> int:
    """Bytes that plain decoding of a sequence must read: the target's weights, and what is valid of its caches.

    Of an embedding that is not the head, too, only rows are read; where it is, all of it is.
    """
    manifest = bundle.manifest
    stored = {record.path: record.size for record in manifest.files}
    graph = manifest.graphs["target"]
    weights = stored[graph.file] + stored.get(f"{graph.file}.data", 0)
    item = {"fp32": 4}.get(manifest.precision, 2)
    target = manifest.target
    return weights + 2 * target.num_layers * target.num_key_value_heads * target.head_dim * context * item


class _TimingCall:
    def __init__(self, call: Any, engine: _TimingEngine) -> None:
        self._call, self._engine = call, engine

    def run(self) -> None:
        stream = self._engine.of.stream
        begun = stream.mark()
        self._call.run()
        self._engine.marks.append((begun, stream.mark()))


class _TimingEngine(EngineView):
    """Notes the device's time of each call."""

    def __init__(self, engine: TensorRTEngine) -> None:
        super().__init__(engine)
        self.of = engine
        self.marks: list[tuple[Any, Any]] = []

    def bind(self, role: str, buffers: Any) -> Any:
        return _TimingCall(super().bind(role, buffers), self)

    def busy_s(self) -> float:
        marks, self.marks = self.marks, []
        return sum(self.of.stream.elapsed_s(*pair) for pair in marks)


def rounds(engine: TensorRTEngine, context: int, width: int, repeats: int) -> dict[str, float]:
    """Wall and device seconds of rounds; width 1 is a plain step."""
    longest = min(engine.bundle.manifest.limits.capacity, context + 2 * width)
    probe = StreamProbe(engine, 1, longest)
    wall = repeated(lambda: wall_time(lambda: probe.run(context, width, "sampler_greedy")), repeats)
    timed = _TimingEngine(engine)
    timed_probe = StreamProbe(timed, 1, longest)

    def busy() -> float:
        timed_probe.run(context, width, "sampler_greedy")
        return timed.busy_s()

    return {"wall_s": wall, "device_s": repeated(busy, repeats)}


def modes(engine: TensorRTEngine, profile: Profile | None, tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    """Tokens/s by mode, interleaved, and accepted lengths."""
    bundle, params = engine.bundle, SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    view = EngineView(engine)
    generators = {name: Generator(view, GeneratorOptions(name)) for name in ("plain", "static")}
    if profile is not None:
        scheduling = StreamScheduling.of_device(bundle, profile.device, needed=True)
        generators["scheduled"] = Generator(view, GeneratorOptions("scheduled"), scheduling=scheduling)
    plain = generators["plain"]
    prompts: Sequence[Any] = PROMPTS if plain.tokenizer is not None else [list(range(1, 33))]
    prompts = [plain.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    speeds: dict[str, list[float]] = {name: [] for name in generators}
    accepted: dict[str, float] = {}
    for repeat in range(1 + repeats):  # the first warms up
        for name, generator in generators.items():
            answers = [generator.generate(prompt, params).statistics for prompt in prompts]
            if repeat:
                speeds[name].append(median(answer.tokens_per_second for answer in answers))
            accepted[name] = float(np.mean([answer.mean_accepted_length for answer in answers]))
    return {
        name: {
            "tokens_per_second": median(values),
            "to_plain": median(value / of_plain for value, of_plain in zip(values, speeds["plain"], strict=True)),
            "accepted_length": accepted[name],
        }
        for name, values in speeds.items()
    }


def torch_steps(target: str, precision: str, context: int, repeats: int, device: str = "cuda") -> dict[str, float]:
    """Seconds of a step of the target at batch 1 in torch, eager and compiled, with a cache of fixed size."""
    import torch
    from transformers import AutoModelForCausalLM, StaticCache

    dtypes = {"fp16": torch.float16, "w4a16": torch.float16, "bf16": torch.bfloat16}
    path, dtype = Path(target), dtypes.get(precision, torch.float32)
    folder, options = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).to(device).eval()
    ids, position = torch.ones((1, 1), dtype=torch.int64, device=device), torch.tensor([context], device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    found = {}
    for name, forward in (("eager", model.forward), ("compiled", torch.compile(model.forward, mode="reduce-overhead"))):
        cache = StaticCache(config=model.config, max_cache_len=context + _WARM_UP + repeats)

        def step(forward: Any = forward, cache: Any = cache) -> None:
            # Masked behind its own length, but as wide as ours all the time.
            forward(input_ids=ids, position_ids=position[None], past_key_values=cache, cache_position=position)
            wait()

        with torch.no_grad():
            found[name] = repeated(lambda step=step: wall_time(step), repeats)
    return found


def measure(engine: TensorRTEngine, profile: Profile | None, arguments: argparse.Namespace) -> dict[str, Any]:
    bundle = engine.bundle
    manifest = bundle.manifest
    block = manifest.drafter.block_size
    context = min(arguments.context, manifest.limits.capacity - 2 * (block + 1))
    repeats = arguments.repeats * 10  # of calls and rounds, which take milliseconds
    calls = {
        f"target, width {width}": call_time(
            engine, "target", {"batch": 1, "width": width, "rows": width}, context, repeats
        )
        for width in range(1, block + 2)
    }
    if "drafter" in manifest.graphs:
        calls["drafter"] = call_time(engine, "drafter", {"batch": 1}, context, repeats)
    rows = {"batch": 1, "rows": block + 1, "block": block, "candidates": max(1, manifest.drafter.candidates)}
    calls["sampler_greedy"] = call_time(engine, "sampler_greedy", rows, context, repeats)
    plain, widest = calls["target, width 1"], calls[f"target, width {block + 1}"]
    reached, needed = bandwidth(engine, repeats), read_a_token(bundle, context)
    of_round = {name: rounds(engine, context, width, repeats) for name, width in (("plain", 1), ("static", block + 1))}
    return {
        "date": date.today().isoformat(),
        "device": {"gpu": [gpu.name for gpu in probe_nvidia_driver(Path("/")).gpus], **engine_facts(engine)},
        "versions": versions_of(PACKAGES),
        "bundle": {"name": bundle.path.name, "precision": manifest.precision, "lowering": manifest.lowering},
        "context": context,
        "calls_s": calls,
        "bandwidth": {"copy_bytes_per_s": reached, "bytes_a_token": needed, "share": needed / plain / reached},
        "ratios": {
            "verify_to_plain": widest / plain,
            "draft_to_plain": calls["drafter"] / plain if "drafter" in calls else None,
            "round_wall_to_device": of_round["static"]["wall_s"] / of_round["static"]["device_s"],
        },
        "rounds": of_round,
        "modes": modes(engine, profile, arguments.tokens, arguments.repeats),
    }


def engine_facts(engine: TensorRTEngine) -> dict[str, Any]:
    return {
        "compute_capability": engine.cuda.compute_capability,
        "integrated": engine.cuda.integrated,
        "memory": engine.cuda.free_memory()[1],
    }


def show(report: dict[str, Any]) -> None:
    print(f"{', '.join(report['device']['gpu']) or 'GPU'}, {report['bundle']['name']}, {report['bundle']['precision']}")
    print(f"context {report['context']}")
    for name, seconds in report["calls_s"].items():
        print(f"  {name:20} {1e6 * seconds:10.1f} us")
    share = report["bandwidth"]
    print(
        f"plain decoding uses {share['share']:.0%} of the {share['copy_bytes_per_s'] / 1e9:.0f} GB/s that copies reach"
    )
    for name, ratio in report["ratios"].items():
        print(f"  {name:20} {'-' if ratio is None else f'{ratio:10.3f}'}")
    for name, of_mode in report["modes"].items():
        speed, ratio, accepted = of_mode["tokens_per_second"], of_mode["to_plain"], of_mode["accepted_length"]
        print(f"  {name:20} {speed:10.1f} tokens/s, {ratio:.2f} times plain, accepted length {accepted:.2f}")
    for name, seconds in report.get("torch_step_s", {}).items():
        print(f"  torch, {name:13} {1 / seconds:10.1f} tokens/s")


def draw(report: dict[str, Any], path: Path) -> None:
    """The cost by width, a round's parts, and tokens/s."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    by_width, parts, speeds = figure.subplots(1, 3)
    costs = [seconds for name, seconds in report["calls_s"].items() if name.startswith("target")]
    by_width.plot(range(1, len(costs) + 1), [1e3 * cost for cost in costs], marker="o")
    by_width.set(xlabel="width", ylabel="ms", title="target", ylim=(0, None))
    names = [*report["rounds"]]
    device = [1e3 * report["rounds"][name]["device_s"] for name in names]
    rest = [1e3 * report["rounds"][name]["wall_s"] - busy for name, busy in zip(names, device, strict=True)]
    parts.bar(names, device, label="device")
    parts.bar(names, rest, bottom=device, label="host")
    parts.set(ylabel="ms", title="a round")
    parts.legend()
    modes_of = report["modes"]
    speeds.bar([*modes_of], [one["tokens_per_second"] for one in modes_of.values()])
    speeds.set(ylabel="tokens/s", title="decoding")
    figure.savefig(path, dpi=120)


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", choices=("tensorrt", "tensorrt-rtx"), default="tensorrt-rtx")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch", metavar="TARGET")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args(given)
    try:
        bundle, choice = Bundle.open(arguments.bundle), EngineChoice(arguments.engine)
        with TensorRTEngine(bundle, choice.engine) as engine:
            report = measure(engine, Profile.load(bundle, choice.device()), arguments)
        if arguments.torch:
            report["torch_step_s"] = torch_steps(
                arguments.torch, bundle.manifest.precision, report["context"], 10 * arguments.repeats
            )
    except DSparkError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    show(report)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.picture:
        draw(report, arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
