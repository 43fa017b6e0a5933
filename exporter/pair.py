"""A target and its drafter, opened and found to fit."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from dspark_edge.exporter.checkpoint import Checkpoint, open_checkpoint
from dspark_edge.exporter.configuration import (
    DecoderConfig,
    DrafterConfig,
    check_fit,
    read_decoder_config,
    read_drafter_config,
)
from dspark_edge.exporter.modules.drafter import Drafter
from dspark_edge.exporter.modules.target import Target
from dspark_edge.exporter.weights import (
    Source,
    check_shapes,
    check_shared_weights,
    drafter_sources,
    read_draft_vocab_ids,
    target_sources,
)

__all__ = ["NGRAM", "Pair", "check_weights", "open_pair"]

NGRAM = "ngram"
"""The drafter that needs no checkpoint: prompt lookup in the runtime."""


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

    def build_drafter(self, positions: int, candidates: int, pool: int | None, dtype: torch.dtype) -> Drafter:
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
    drafter, drafter_config = pair.drafter, pair.drafter_config
    if drafter is not None and drafter_config is not None and drafter_config.draft_vocab_size is not None:
        read_draft_vocab_ids(drafter, drafter_config)
    with torch.device("meta"):
        check_shapes(pair.build_target(capacity, dtype), pair.target_sources(capacity), pair.target.source)
        if pair.drafter is not None:
            module = pair.build_drafter(capacity, candidates, None, dtype)
            check_shapes(module, pair.drafter_sources(capacity), pair.drafter.source)
    if pair.drafter is not None:
        check_shared_weights(pair.target, pair.target_config, pair.drafter)
