"""Export: checkpoints on disk → a bundle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import onnx_ir as ir

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.bundle_writer import BundleWriter
from dspark_edge.engines.errors import CheckpointError, InvalidInputError
from dspark_edge.engines.manifest import SCHEMA_VERSION, Limits, Manifest
from dspark_edge.exporter.checkpoint import Checkpoint
from dspark_edge.exporter.facts import drafter_facts, provenance, target_facts
from dspark_edge.exporter.graphs import Graph, Report, pack_graphs, resolve_quantization, shorten_drafter, trace_graphs
from dspark_edge.exporter.options import PRECISIONS, ExportOptions
from dspark_edge.exporter.pair import NGRAM, Pair, check_weights, open_pair
from dspark_edge.exporter.streaming import WeightStreamer, bytes_to_write, shared_weights
from dspark_edge.exporter.tracing import TORCH_DTYPES, graph_opsets

__all__ = ["NGRAM", "PRECISIONS", "ExportOptions", "export_bundle"]

_CALIBRATION = "calibration.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def _read_tokenizer(source: str | Path) -> dict[str, bytes]:
    """Tokenizer files of a folder, or a tokenizer.json by itself."""
    path = Path(source)
    found = {path.name: path} if path.is_file() else {name: path / name for name in _TOKENIZER_FILES}
    files = {name: file.read_bytes() for name, file in found.items() if file.is_file()}
    if "tokenizer.json" not in files:
        raise InvalidInputError(f"{source}: no tokenizer.json there; give the folder or file that holds one")
    return files


def _without_tokenizer(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The checkpoint's other text files, where the user brings a tokenizer; its own may be unreadable."""
    try:
        files = checkpoint.text_files()
    except CheckpointError:
        return {}
    return {name: data for name, data in files.items() if name not in _TOKENIZER_FILES}


def _text_files(pair: Pair, tokenizer: str | Path | None) -> dict[str, bytes]:
    """The bundle's text files: the target's, the user's tokenizer instead of its own, the drafter's calibration."""
    if tokenizer is None:
        files = pair.target.text_files()
    else:
        files = {**_without_tokenizer(pair.target), **_read_tokenizer(tokenizer)}
    files.pop(_CALIBRATION, None)
    if pair.drafter is not None and _CALIBRATION in (beside := pair.drafter.text_files()):
        files[_CALIBRATION] = beside[_CALIBRATION]
    return files


def _write_graphs(
    writer: BundleWriter,
    graphs: Mapping[str, Graph],
    pair: Pair,
    options: ExportOptions,
    limits: tuple[int, int],
    report: Report,
) -> dict[str, Graph]:
    """Write graphs with their weights, and the short and the packed ones, which refer to these.

    Args:
        limits: cache slots, and γ.

    Returns:
        All that were written.
    """
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
    # Now the weights have their places, to which the others refer.
    capacity, block_size = limits
    short = shorten_drafter(graphs, pair, options, capacity)
    all_graphs = {**graphs, **short, **pack_graphs(graphs, options.resolve_packed(), block_size)}
    for role, graph in all_graphs.items():
        if not graph.sources:
            writer.write_bytes(f"{role}.onnx", ir.to_proto(graph.model).SerializeToString())
    return all_graphs


def _write_texts(writer: BundleWriter, pair: Pair, text_files: Mapping[str, bytes]) -> None:
    """Configuration and tokenizer."""
    writer.write_bytes("config.json", json.dumps(dict(pair.target.config), indent=2).encode())
    for name, data in text_files.items():
        writer.write_bytes(name, data)


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

    A `calibration.json` beside the drafter's weights goes along; `dspark-edge calibrate` replaces it.

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
    with ExitStack() as stack:
        report("reading checkpoints", 0, 1)
        pair = open_pair(stack, target, drafter)
        quantization = resolve_quantization(pair, options)
        facts = drafter_facts(pair, options)
        options.resolve_short_block(pair.drafter_config)  # refuses what cannot be before the work
        capacity = options.resolve_capacity(pair.target_config, facts.block_size)
        check_weights(pair, capacity, facts.candidates, TORCH_DTYPES[options.dtype])
        text_files = _text_files(pair, tokenizer)
        described = target_facts(pair, text_files)
        report("reading checkpoints", 1, 1)
        writer = stack.enter_context(BundleWriter(Path(output), overwrite))  # refuses a taken output before the work
        traced = trace_graphs(pair, options, capacity, report)
        graphs = _write_graphs(writer, traced, pair, options, (capacity, facts.block_size), report)
        _write_texts(writer, pair, text_files)
        return writer.finish(
            Manifest(
                schema_version=SCHEMA_VERSION,
                lowering=options.lowering,  # type: ignore[arg-type]
                precision=options.precision,  # type: ignore[arg-type]
                opsets=graph_opsets([graph.model for graph in graphs.values()]),
                target=described,
                drafter=facts,
                limits=Limits(capacity, options.max_batch),
                graphs={role: graph.spec(role) for role, graph in graphs.items()},
                files=(),
                provenance=provenance(target, drafter),
                quantization=quantization,
                shared_weights=shared_weights({role: one.model for role, one in traced.items()}, described.vocab_size),
            )
        )
