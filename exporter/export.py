"""Export: checkpoints on disk → a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.bundle_writer import BundleWriter
from dspark_edge.engines.errors import CheckpointError, InvalidInputError
from dspark_edge.engines.manifest import (
    SCHEMA_VERSION,
    DrafterFacts,
    GraphSpec,
    Limits,
    Manifest,
    Provenance,
    TargetFacts,
)
from dspark_edge.exporter.checkpoint import Checkpoint, open_checkpoint
from dspark_edge.exporter.configuration import (
    DecoderConfig,
    DrafterConfig,
    check_fit,
    read_decoder_config,
    read_drafter_config,
    read_eos_token_ids,
)
from dspark_edge.exporter.contracts import drafter_contract, sampler_contracts, target_contract
from dspark_edge.exporter.lowerings import Lowering, get_lowering
from dspark_edge.exporter.modules.drafter import Drafter
from dspark_edge.exporter.modules.sampler import FilteredAcceptance, GreedyAcceptance, SamplingAcceptance
from dspark_edge.exporter.modules.target import Target
from dspark_edge.exporter.streaming import WeightStreamer, bytes_to_write
from dspark_edge.exporter.tracing import TORCH_DTYPES, GraphContract, graph_opsets, trace
from dspark_edge.exporter.weights import (
    Source,
    check_shapes,
    check_shared_weights,
    drafter_sources,
    target_sources,
)

__all__ = ["NGRAM", "PRECISIONS", "ExportOptions", "Pair", "export_bundle", "open_pair"]

NGRAM = "ngram"
"""The drafter that needs no checkpoint: prompt lookup in the runtime."""

PRECISIONS: Mapping[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Precision → type of weights, activations and caches."""

Report = Callable[[str, int, int], None]
"""Progress: what is being done, how much of it is done, how much there is."""

_SAMPLERS: Mapping[str, type[nn.Module]] = {
    "sampler_greedy": GreedyAcceptance,
    "sampler": SamplingAcceptance,
    "sampler_filtered": FilteredAcceptance,
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """How a bundle is made.

    Raises:
        InvalidInputError: an option is unknown or out of range.
    """

    lowering: str = "ort"
    precision: str = "fp32"
    capacity: int | None = None  # cache slots, tokens; None: 4096 (ort) or 2048, at most what the target was made for
    max_batch: int = 1
    candidates: int = 64  # K, the tokens of a step that drafting samples from
    candidate_pool: int | None = None  # tokens of a position that the Markov bias may lift; None: all
    ngram_block_size: int = 7

    def __post_init__(self) -> None:
        lowering = get_lowering(self.lowering)
        if self.precision not in PRECISIONS:
            raise InvalidInputError(f"unknown precision {self.precision!r}; choose one of: {', '.join(PRECISIONS)}")
        for name in ("capacity", "max_batch", "candidates", "candidate_pool", "ngram_block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInputError(f"{name} is {value}, expected at least 1")
        if self.candidate_pool is not None and self.candidate_pool < self.candidates:
            raise InvalidInputError(
                f"candidate_pool is {self.candidate_pool}, expected at least the {self.candidates} candidates"
            )
        if self.max_batch > 1 and not lowering.batched:
            raise InvalidInputError(
                f"the {self.lowering!r} lowering runs one sequence at a time; "
                f"for a max_batch of {self.max_batch} choose the lowering 'onnx' or 'decomposed'"
            )

    @property
    def dtype(self) -> str:
        return PRECISIONS[self.precision]

    def resolve_capacity(self, target: DecoderConfig, block_size: int) -> int:
        """The capacity to export with.

        Raises:
            InvalidInputError: it passes the target's context, or holds no block.
        """
        if self.capacity is None:
            default = 4096 if get_lowering(self.lowering).dynamic_capacity else 2048
            return min(default, target.max_position_embeddings)
        if self.capacity > target.max_position_embeddings:
            raise InvalidInputError(
                f"capacity is {self.capacity}, but the target was made for {target.max_position_embeddings} positions"
            )
        if self.capacity <= block_size + 1:
            raise InvalidInputError(f"capacity is {self.capacity}, expected more than a block of {block_size} tokens")
        return self.capacity


@dataclass(frozen=True, slots=True)
class Pair:
    """A target and its drafter, opened and found to fit; `drafter` is None for ngram."""

    target: Checkpoint
    target_config: DecoderConfig
    drafter: Checkpoint | None
    drafter_config: DrafterConfig | None

    def build_target(self, positions: int, dtype: torch.dtype) -> Target:
        return Target(self.target_config, self.drafter_config, positions, dtype)

    def target_sources(self, positions: int) -> dict[str, Source]:
        return target_sources(self.target, self.target_config, self.drafter, self.drafter_config, positions)

    def build_drafter(
        self, positions: int, candidates: int, pool: int | None, dtype: torch.dtype
    ) -> Drafter:
        return Drafter(self._drafter()[1], positions, candidates, pool, dtype)

    def drafter_sources(self, positions: int) -> dict[str, Source]:
        checkpoint, config = self._drafter()
        return drafter_sources(self.target, self.target_config, checkpoint, config, positions)

    def _drafter(self) -> tuple[Checkpoint, DrafterConfig]:
        if self.drafter is None or self.drafter_config is None:
            raise RuntimeError("an ngram drafter has no module")
        return self.drafter, self.drafter_config


def open_pair(stack: ExitStack, target: str | Path, drafter: str | Path) -> Pair:
    """Open both checkpoints and check, without reading all weights, that they are whole and belong together.

    Args:
        stack: closes the checkpoints.
        target: a folder, a GGUF file or a Hugging Face name.
        drafter: the same, or `NGRAM`.

    Raises:
        CheckpointError: a checkpoint is missing, damaged or unsupported (MismatchError: they do not fit).
    """
    target_checkpoint = stack.enter_context(open_checkpoint(target))
    config = read_decoder_config(target_checkpoint.config, str(target))
    if str(drafter) == NGRAM:
        return Pair(target_checkpoint, config, None, None)
    drafter_checkpoint = stack.enter_context(open_checkpoint(drafter))
    drafter_config = read_drafter_config(drafter_checkpoint.config, str(drafter))
    check_fit(config, drafter_config)
    return Pair(target_checkpoint, config, drafter_checkpoint, drafter_config)


def check_weights(pair: Pair, capacity: int, candidates: int, dtype: torch.dtype) -> None:
    """Check every tensor's presence and shape, and the drafter's copies of the target's, before any work is done."""
    with torch.device("meta"):
        check_shapes(pair.build_target(capacity, dtype), pair.target_sources(capacity), pair.target.source)
        if pair.drafter is not None:
            module = pair.build_drafter(capacity, candidates, None, dtype)
            check_shapes(module, pair.drafter_sources(capacity), pair.drafter.source)
    if pair.drafter is not None:
        check_shared_weights(pair.target, pair.target_config, pair.drafter)


@dataclass(frozen=True, slots=True)
class _Graph:
    """A traced graph, its contract and where its weights come from."""

    model: ir.Model
    contract: GraphContract
    sources: Mapping[str, Source]

    def spec(self, role: str) -> GraphSpec:
        return GraphSpec(
            f"{role}.onnx", self.contract.flat_inputs, self.contract.outputs, dict(self.contract.aliases)
        )


def _trace_graphs(
    pair: Pair, options: ExportOptions, lowering: Lowering, capacity: int, report: Report
) -> dict[str, _Graph]:
    """All graphs of the bundle, by role."""
    dtype = TORCH_DTYPES[options.dtype]
    cache_size = "capacity" if lowering.dynamic_capacity else capacity
    config, drafter_config = pair.target_config, pair.drafter_config
    candidates = min(options.candidates, config.vocab_size)
    jobs: list[tuple[str, Callable[[], nn.Module], GraphContract, Mapping[str, Source]]] = [
        (
            "target",
            lambda: pair.build_target(capacity, dtype),
            target_contract(config, drafter_config, cache_size, options.dtype),
            pair.target_sources(capacity),
        )
    ]
    if drafter_config is not None:
        pool = options.candidate_pool
        pool = None if pool is None or pool >= config.vocab_size or not drafter_config.markov_rank else pool
        jobs.append(
            (
                "drafter",
                lambda: pair.build_drafter(capacity, candidates, pool, dtype),
                drafter_contract(drafter_config, candidates, cache_size, options.dtype),
                pair.drafter_sources(capacity),
            )
        )
    graphs: dict[str, _Graph] = {}
    samplers = sampler_contracts(config.vocab_size)
    total = len(jobs) + len(samplers)
    for role, build, contract, sources in jobs:
        report("tracing", len(graphs), total)
        graphs[role] = _Graph(trace(build, contract, lowering), contract, sources)
    for role, contract in samplers.items():
        report("tracing", len(graphs), total)
        graphs[role] = _Graph(_trace_sampler(role, config.vocab_size, options.lowering), contract, {})
    report("tracing", total, total)
    return graphs


@lru_cache(maxsize=12)
def _trace_sampler(role: str, vocab_size: int, lowering: str) -> ir.Model:
    """A sampler graph; it depends on nothing else, so that exporting many bundles traces it once. Do not change it."""
    return trace(_SAMPLERS[role], sampler_contracts(vocab_size)[role], get_lowering(lowering))


def _target_facts(pair: Pair, text_files: Mapping[str, bytes]) -> TargetFacts:
    config = pair.target_config
    generation = _parse_json(text_files.get("generation_config.json", b"{}"), "generation_config.json", pair.target)
    names = {
        name
        for source in pair.target_sources(1).values()
        if getattr(source, "origin", "") == "target"
        for name in source.names  # type: ignore[union-attr]
    }
    sizes = (torch.Size(pair.target.shape(name)).numel() for name in names)
    architecture = pair.target.config.get("architectures", [config.family])
    return TargetFacts(
        architecture=str(architecture[0]),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        parameters=sum(sizes),
        bos_token_id=config.bos_token_id,
        eos_token_ids=read_eos_token_ids(pair.target.config, generation),
    )


def _drafter_facts(pair: Pair, options: ExportOptions) -> DrafterFacts:
    drafter = pair.drafter_config
    if drafter is None:
        return DrafterFacts.ngram(options.ngram_block_size)
    return DrafterFacts(
        kind="dspark",
        block_size=drafter.block_size,
        num_layers=drafter.backbone.num_layers,
        num_key_value_heads=drafter.backbone.num_key_value_heads,
        head_dim=drafter.backbone.head_dim,
        tap_layers=drafter.tap_layers,
        markov_rank=drafter.markov_rank,
        markov_head=drafter.markov_head,
        mask_token_id=drafter.mask_token_id,
        confidence=drafter.confidence,
        candidates=min(options.candidates, pair.target_config.vocab_size),
    )


def _parse_json(data: bytes, name: str, checkpoint: Checkpoint) -> dict[str, object]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.source}: {name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{checkpoint.source}: {name} holds {type(value).__name__}, expected an object")
    return value


def _read_tokenizer(source: str | Path) -> dict[str, bytes]:
    """Tokenizer files of a folder, or a tokenizer.json by itself."""
    path = Path(source)
    found = {path.name: path} if path.is_file() else {name: path / name for name in _TOKENIZER_FILES}
    files = {name: file.read_bytes() for name, file in found.items() if file.is_file()}
    if "tokenizer.json" not in files:
        raise InvalidInputError(f"{source}: no tokenizer.json there; give the folder or file that holds one")
    return files


def _name_of(source: str | Path) -> str:
    path = Path(source)
    return path.resolve().name if path.exists() else str(source)


def _tool_versions() -> dict[str, str]:
    packages = ("dspark-edge", "torch", "onnx", "onnx-ir", "onnxscript")
    versions: dict[str, str] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def export_bundle(
    target: str | Path,
    drafter: str | Path,
    output: str | Path,
    options: ExportOptions | None = None,
    *,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    report: Report = lambda what, done, total: None,
) -> Bundle:
    """Export a target and its drafter to a bundle.

    Args:
        target: a folder in Hugging Face layout, a GGUF file, or a Hugging Face name.
        drafter: a DeepSpec checkpoint's folder or name, or "ngram".
        output: the bundle's folder; must not hold anything, or a bundle with `overwrite`.
        options: lowering, precision and sizes.
        tokenizer: a folder or tokenizer.json to use instead of the target's own.
        overwrite: replace an existing bundle.
        report: progress.

    Returns:
        The opened bundle.

    Raises:
        CheckpointError, InvalidInputError, BundleError: see there; nothing is left behind.
    """
    options = options or ExportOptions()
    lowering = get_lowering(options.lowering)
    with ExitStack() as stack:
        report("reading checkpoints", 0, 1)
        pair = open_pair(stack, target, drafter)
        facts = _drafter_facts(pair, options)
        capacity = options.resolve_capacity(pair.target_config, facts.block_size)
        check_weights(pair, capacity, min(options.candidates, pair.target_config.vocab_size), TORCH_DTYPES[options.dtype])
        text_files = {} if tokenizer is None else _read_tokenizer(tokenizer)
        own_files = pair.target.text_files() if tokenizer is None else _without_tokenizer(pair.target)
        text_files = {**own_files, **text_files}
        target_facts = _target_facts(pair, text_files)
        report("reading checkpoints", 1, 1)
        writer = stack.enter_context(BundleWriter(Path(output), overwrite))  # refuses a taken output before the work
        graphs = _trace_graphs(pair, options, lowering, capacity, report)
        total = sum(bytes_to_write(graph.model, graph.sources) for graph in graphs.values())
        writer.reserve(total)
        written = 0

        def count(size: int) -> None:
            nonlocal written
            written += size
            report("writing weights", written, total)

        streamer = WeightStreamer(writer, count)
        for role, graph in graphs.items():
            if graph.sources:
                streamer.write(f"{role}.onnx", graph.model, graph.sources)
            else:
                writer.write_bytes(f"{role}.onnx", ir.to_proto(graph.model).SerializeToString())
        writer.write_bytes("config.json", json.dumps(dict(pair.target.config), indent=2).encode())
        for name, data in text_files.items():
            writer.write_bytes(name, data)
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            lowering=options.lowering,  # type: ignore[arg-type]
            precision=options.precision,  # type: ignore[arg-type]
            opsets=graph_opsets([graph.model for graph in graphs.values()]),
            target=target_facts,
            drafter=facts,
            limits=Limits(capacity, options.max_batch),
            graphs={role: graph.spec(role) for role, graph in graphs.items()},
            files=(),
            provenance=Provenance(
                created_at=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
                tool_versions=_tool_versions(),
                target=_name_of(target),
                drafter=_name_of(drafter),
            ),
        )
        return writer.finish(manifest)


def _without_tokenizer(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The checkpoint's other text files, where the user brings a tokenizer; its own may be unreadable."""
    try:
        files = checkpoint.text_files()
    except CheckpointError:
        return {}
    return {name: data for name, data in files.items() if name not in _TOKENIZER_FILES}
