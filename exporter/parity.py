"""Parity: does a bundle compute what its checkpoints say?

The torch modules, in fp32 whatever the bundle's precision, are the reference; an engine runs the bundle's graphs on
the same tokens. A sequence is fed in chunks of uneven width, a block is drafted behind every chunk, and the sampler
graphs judge those drafts, so that every graph is met at several widths and cache lengths, as in decoding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Buffer, Engine, HostArray
from dspark_edge.engines.errors import InvalidInputError, MismatchError
from dspark_edge.engines.manifest import Manifest, TensorSpec
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.exporter.export import Pair, open_pair
from dspark_edge.exporter.modules.sampler import FilteredAcceptance, GreedyAcceptance, SamplingAcceptance
from dspark_edge.exporter.weights import Source, load_module

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["TOLERANCES", "GraphRunner", "ParityReport", "ParityRow", "compare_bundle", "render"]

TOLERANCES: Mapping[str, float] = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1.5e-1}
"""Precision → largest error, as a fraction of the output's largest magnitude where that is above 1.

fp32 leaves room for another order of summation only. The others are some forty roundings of their type (2⁻¹¹, 2⁻⁸): a
model of a few dozen layers keeps a tenth of that, a wrong graph is off by far more.
"""

_WIDTHS = (13, 1, 4)
_DEFAULT_POSITIONS = 54  # three times the widths
_SAMPLERS: Mapping[str, type[nn.Module]] = {
    "sampler_greedy": GreedyAcceptance,
    "sampler": SamplingAcceptance,
    "sampler_filtered": FilteredAcceptance,
}
# A draw at the border between two tokens may fall on either side of it: one judgement in ten may differ.
_SAMPLER_AGREEMENT = 0.9

EngineFactory = Callable[[Bundle], Engine]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One output, over all calls."""

    name: str
    max_abs_error: float
    max_rel_error: float  # the largest error as a fraction of the reference's largest magnitude
    mean_abs_error: float
    top1_agreement: float | None  # fraction of rows with the same best token, of drafts or judgements that agree
    tolerance: float  # on max_abs_error, scaled up where the reference's largest magnitude is above 1
    passed: bool
    worst: str | None = None  # which of several tensors has the largest error


@dataclass(frozen=True, slots=True)
class ParityReport:
    """What `compare_bundle` found."""

    bundle: str
    lowering: str
    precision: str
    positions: int  # tokens that were compared
    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def to_json(self) -> dict[str, object]:
        """The report as JSON values; an error that is not finite is null."""
        rows = [
            {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}
            for row in map(asdict, self.rows)
        ]
        return {
            "bundle": self.bundle,
            "lowering": self.lowering,
            "precision": self.precision,
            "positions": self.positions,
            "passed": self.passed,
            "rows": rows,
        }


def render(report: ParityReport, console: Console) -> None:
    """Print a report as a table."""
    from rich.table import Table

    table = Table(title=f"{report.bundle}: {report.lowering}, {report.precision}, {report.positions} positions")
    table.add_column("output")
    for column in ("max abs", "max rel", "mean abs", "agreement", "tolerance"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in report.rows:
        agreement = "" if row.top1_agreement is None else f"{row.top1_agreement:.2%}"
        errors = (row.max_abs_error, row.max_rel_error, row.mean_abs_error)
        name = row.name if row.worst is None or row.passed else f"{row.name} (worst: {row.worst})"
        verdict = "[green]ok[/green]" if row.passed else "[red]FAILED[/red]"
        table.add_row(name, *(f"{error:.1e}" for error in errors), agreement, f"{row.tolerance:.0e}", verdict)
    console.print(table)


class GraphRunner:
    """A bundle's graphs on an engine, with caches; for checking, not for speed: every call binds anew.

    Args:
        engine: runs the graphs.
        capacity: cache slots where the bundle leaves that open; a bundle with a static capacity keeps its own.
        batch: sequences.
    """

    def __init__(self, engine: Engine, capacity: int, batch: int = 1) -> None:
        self.engine = engine
        self.lengths: HostArray = np.zeros(batch, np.int64)
        self.caches: dict[str, Buffer] = {}
        for graph in engine.bundle.manifest.graphs.values():
            for name in graph.aliases.values():
                spec = next(spec for spec in graph.inputs if spec.name == name)
                if name not in self.caches:
                    shape = _resolve(spec, {"batch": batch, "capacity": capacity})
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
            buffers[spec.name] = self.engine.allocate(spec.dtype, _resolve(spec, sizes))
        self.engine.bind(role, buffers).run()
        return {spec.name: np.array(buffers[spec.name].read()) for spec in outputs}

    def extend(self, token_ids: HostArray) -> HostArray:
        """Run the target on token_ids [B, W] behind the valid part of the caches: logits of all rows [B, W, V]."""
        batch, width = token_ids.shape
        rows = np.broadcast_to(np.arange(width), (batch, width))
        inputs = {"input_ids": token_ids, "cache_lengths": self.lengths, "logit_rows": rows}
        logits = self.run("target", inputs)["logits"]
        self.lengths = self.lengths + width
        return logits

    def draft(self, anchor_ids: HostArray, temperature: float, noise: HostArray) -> dict[str, HostArray]:
        """Draft behind anchors [B] with noise [B, γ, K]; the caches stay valid up to the same lengths."""
        inputs = {
            "anchor_ids": anchor_ids,
            "cache_lengths": self.lengths,
            "temperature": np.full(len(anchor_ids), temperature, np.float32),
            "noise": noise,
        }
        return self.run("drafter", inputs)


def _resolve(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


@dataclass(slots=True)
class _Errors:
    """Errors of one output, collected over calls."""

    name: str
    worst: str | None = None
    largest: float = 0.0
    magnitude: float = 0.0
    total: float = 0.0
    count: int = 0
    agreeing: int = 0
    ranked: int = 0

    def add(self, given: HostArray, expected: HostArray, what: str | None = None) -> None:
        if not expected.size:
            return
        wanted = np.asarray(expected, np.float64)
        errors = np.abs(np.asarray(given, np.float64) - wanted)
        errors = np.where(np.isnan(errors), np.inf, errors)
        if what is not None and (self.worst is None or errors.max() > self.largest):
            self.worst = what
        self.largest = max(self.largest, float(errors.max()))
        self.magnitude = max(self.magnitude, float(np.abs(wanted).max()))
        self.total += float(errors.sum())
        self.count += wanted.size

    def agree(self, same: HostArray) -> None:
        self.agreeing += int(same.sum())
        self.ranked += same.size

    def row(self, tolerance: float, agreement: float = 0.0) -> ParityRow:
        """The verdict; `agreement` is the least fraction of agreeing rows."""
        share = self.agreeing / self.ranked if self.ranked else None
        return ParityRow(
            name=self.name,
            max_abs_error=self.largest,
            max_rel_error=self.largest / self.magnitude if self.magnitude else self.largest,
            mean_abs_error=self.total / self.count if self.count else 0.0,
            top1_agreement=share,
            tolerance=tolerance,
            passed=self.largest <= tolerance * max(1.0, self.magnitude) and (share is None or share >= agreement),
            worst=self.worst,
        )


@dataclass(frozen=True, slots=True)
class _DraftCase:
    """One call of the drafter and what torch makes of it."""

    length: int  # the anchor's position
    temperature: float
    noise: HostArray  # [1, γ, K]
    expected: Mapping[str, HostArray]


@dataclass(frozen=True, slots=True)
class _Reference:
    """What torch computes."""

    token_ids: HostArray  # [1, P + 1] int64; the last is only ever an anchor
    logits: HostArray  # [1, P, V]
    caches: Mapping[str, HostArray]  # by the names of the target graph's inputs, [1, heads, P + γ, D]
    drafts: tuple[_DraftCase, ...]


def compare_bundle(
    bundle: Bundle | str | Path,
    target: str | Path,
    drafter: str | Path,
    *,
    positions: int | None = None,
    seed: int = 0,
    engine_factory: EngineFactory | None = None,
    tolerance: float | None = None,
    report: Report = lambda what, done, total: None,
) -> ParityReport:
    """Compare a bundle's graphs, run by an engine, with the torch modules of its checkpoints in fp32.

    Args:
        bundle: the bundle, or its folder.
        target: the checkpoint that it was exported from.
        drafter: the same, or "ngram".
        positions: tokens to compare; None: 54, or what the capacity holds.
        seed: of the token ids and the noise.
        engine_factory: makes the engine; None: ONNX Runtime on the CPU.
        tolerance: instead of `TOLERANCES`.
        report: progress: what is being done, how much of it is done, how much there is.

    Raises:
        MismatchError: the bundle was not made from these checkpoints.
        InvalidInputError: `positions` does not fit the capacity.
        BundleError, CheckpointError, EngineError: see there.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    manifest = opened.manifest
    limit = manifest.limits.capacity - manifest.drafter.block_size
    positions = min(_DEFAULT_POSITIONS, limit) if positions is None else positions
    if not 1 <= positions <= limit:
        raise InvalidInputError(f"positions is {positions}, expected 1 to {limit}, what the bundle's caches hold")
    tolerance = TOLERANCES.get(manifest.precision, max(TOLERANCES.values())) if tolerance is None else tolerance
    with ExitStack() as stack:
        pair = open_pair(stack, target, drafter)
        _check_fit(manifest, pair)
        # The engine first: what it cannot run is known before the weights are read.
        engine = stack.enter_context((engine_factory or OnnxRuntimeEngine)(opened))
        report("torch", 0, 1)
        reference = _reference(pair, manifest, positions, seed)
        report("torch", 1, 1)
        runner = GraphRunner(engine, positions + manifest.drafter.block_size)
        rows = _compare_models(runner, reference, tolerance, report)
        samplers = [role for role in _SAMPLERS if role in manifest.graphs]
        for number, role in enumerate(samplers):
            report("samplers", number, len(samplers))
            rows.append(_compare_sampler(runner, reference, role, seed))
        report("samplers", len(samplers), len(samplers))
    return ParityReport(opened.path.name, manifest.lowering, manifest.precision, positions, tuple(rows))


def _check_fit(manifest: Manifest, pair: Pair) -> None:
    """Raise `MismatchError` unless the bundle can have been made from these checkpoints."""
    facts, config, drafter = manifest.target, pair.target_config, pair.drafter_config
    kind = "ngram" if drafter is None else "dspark"
    compared: list[tuple[str, object, object]] = [("kind of drafter", manifest.drafter.kind, kind)]
    for name in ("vocab_size", "hidden_size", "num_layers", "num_key_value_heads", "head_dim"):
        compared.append((f"target's {name}", getattr(facts, name), getattr(config, name)))
    if drafter is not None:
        for name in ("block_size", "tap_layers", "markov_rank", "markov_head", "confidence"):
            compared.append((f"drafter's {name}", getattr(manifest.drafter, name), getattr(drafter, name)))
        for name in ("num_layers", "num_key_value_heads", "head_dim"):
            compared.append((f"drafter's {name}", getattr(manifest.drafter, name), getattr(drafter.backbone, name)))
    for what, in_bundle, in_checkpoint in compared:
        if in_bundle != in_checkpoint:
            raise MismatchError(
                f"bundle and checkpoints do not fit: the {what} is {in_bundle} in the bundle, {in_checkpoint} in the "
                "checkpoints; give the target and the drafter that the bundle was exported from"
            )


def _chunks(positions: int) -> Iterator[tuple[int, int]]:
    """Uneven pieces (begin, end) of a sequence."""
    begin = 0
    for width in cycle(_WIDTHS):
        if begin >= positions:
            return
        yield begin, min(begin + width, positions)
        begin += width


def _loaded(build: Callable[[], nn.Module], sources: Mapping[str, Source]) -> nn.Module:
    with torch.device("meta"):
        module = build()
    return load_module(module, sources)


@torch.no_grad()
def _reference(pair: Pair, manifest: Manifest, positions: int, seed: int) -> _Reference:
    """What torch computes; the target's weights are let go before the drafter's are read."""
    generator = np.random.default_rng(seed)
    token_ids = generator.integers(0, pair.target_config.vocab_size, (1, positions + 1))
    slots = positions + manifest.drafter.block_size
    names = [name for name in manifest.graphs["target"].aliases.values()]
    count = 2 * pair.target_config.num_layers
    caches = [
        torch.zeros(1, *(size for size in _resolve(spec, {"batch": 1, "capacity": slots})[1:2]), slots, spec_size)
        for spec, spec_size in _cache_specs(manifest, names)
    ]
    target = _loaded(lambda: pair.build_target(slots, torch.float32), pair.target_sources(slots))
    logits = []
    for begin, end in _chunks(positions):
        ids = torch.from_numpy(token_ids[:, begin:end])
        rows = torch.arange(end - begin)[None]
        part, own, context = target(ids, torch.tensor([begin]), rows, caches[:count], caches[count:])
        caches = [*own, *context]
        logits.append(part)
    del target
    drafts = _reference_drafts(pair, manifest, token_ids, caches[count:], generator)
    by_name = {name: cache.numpy() for name, cache in zip(names, caches, strict=True)}
    return _Reference(token_ids, torch.cat(logits, dim=1).numpy(), by_name, drafts)
