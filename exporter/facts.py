"""What a bundle's manifest says of the models in it, and of where they come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from dspark_edge.engines.errors import CheckpointError
from dspark_edge.engines.manifest import DrafterFacts, Provenance, TargetFacts
from dspark_edge.exporter.checkpoint import Checkpoint
from dspark_edge.exporter.configuration import read_eos_token_ids
from dspark_edge.exporter.options import ExportOptions
from dspark_edge.exporter.pair import Pair
from dspark_edge.exporter.weights import WeightSource

__all__ = ["drafter_facts", "provenance", "target_facts"]


def target_facts(pair: Pair, text_files: Mapping[str, bytes]) -> TargetFacts:
    """The target's facts, from its configuration, its headers and its generation_config.json.

    Raises:
        CheckpointError: generation_config.json is damaged, or names tokens outside the vocabulary.
    """
    config = pair.target_config
    generation = _parse_json(text_files.get("generation_config.json", b"{}"), "generation_config.json", pair.target)
    names = {
        name
        for source in pair.target_sources(1).values()
        if isinstance(source, WeightSource) and source.origin == "target"
        for name in source.names
    }
    sizes = (torch.Size(pair.target.shape(name)).numel() for name in names)
    eos_token_ids = read_eos_token_ids(pair.target.config, generation)
    for token in (*eos_token_ids, config.bos_token_id or 0):
        if not 0 <= token < config.vocab_size:
            raise CheckpointError(
                f"{pair.target.source}: the bos or eos token id {token} is outside the vocabulary "
                f"of {config.vocab_size}"
            )
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
        eos_token_ids=eos_token_ids,
    )


def drafter_facts(pair: Pair, options: ExportOptions) -> DrafterFacts:
    """The drafter's facts, with what the options make of it."""
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
        candidates=options.resolve_candidates(drafter),
        candidate_pool=options.resolve_pool(drafter) or 0,
        draft_vocab_size=drafter.draft_vocab_size,
    )


def _parse_json(data: bytes, name: str, checkpoint: Checkpoint) -> dict[str, object]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.source}: {name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{checkpoint.source}: {name} holds {type(value).__name__}, expected an object")
    return value


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


def provenance(target: str | Path, drafter: str | Path) -> Provenance:
    """Sources as the user named them (a local path by its base name), the time, and the tools."""
    return Provenance(
        created_at=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        tool_versions=_tool_versions(),
        target=_name_of(target),
        drafter=_name_of(drafter),
    )
