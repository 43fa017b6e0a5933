"""Going on from a drafter that is trained already: with more responses, or towards another kind of prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.exporter.checkpoint import Checkpoint, open_checkpoint
from dspark_edge.exporter.configuration import DrafterConfig, read_drafter_config
from dspark_edge.exporter.modules.drafter import PEAK_FEATURES
from dspark_edge.exporter.weights import read_draft_vocab_ids
from dspark_edge.trainer.training.drafter_model import TrainableDrafter

__all__ = ["continue_from", "read_shape", "read_vocabulary"]

_W2 = "markov_head.markov_w2.weight"
_CONFIDENCE = "confidence_head.proj.weight"


def read_shape(folder: Path) -> DrafterConfig:
    """The shape of a drafter on disk.

    Raises:
        CheckpointError: it is missing, damaged or unsupported.
    """
    with open_checkpoint(folder) as checkpoint:
        return read_drafter_config(checkpoint.config, str(folder))


def read_vocabulary(folder: Path) -> np.ndarray | None:
    """The draft vocabulary of a drafter on disk, [P] ids; None: the whole vocabulary.

    Raises:
        CheckpointError: it is missing, damaged or unsupported.
    """
    with open_checkpoint(folder) as checkpoint:
        config = read_drafter_config(checkpoint.config, str(folder))
        return read_draft_vocab_ids(checkpoint, config).numpy() if config.draft_vocab_size else None


@torch.no_grad()
def continue_from(drafter: TrainableDrafter, folder: Path, vocabulary_ids: np.ndarray | None) -> None:
    """Take all parameters of a drafter of the same shape. Its draft vocabulary may be another one: tokens that it did
    not draft start without a Markov bias. And its confidence head may be one that does not see the draft's
    distribution: then that counts for nothing at first.

    Args:
        drafter: its feature scale is set; on the CPU.
        folder: a DeepSpec checkpoint.
        vocabulary_ids: [P] ids of the drafter's draft vocabulary; None: the whole vocabulary.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        InvalidInputError: it has another shape.
    """
    with open_checkpoint(folder) as checkpoint:
        config = read_drafter_config(checkpoint.config, str(folder))
        for name in ("tap_layers", "markov_head", "mask_token_id"):
            theirs, own = getattr(config, name), getattr(drafter.config, name)
            if theirs != own:
                raise InvalidInputError(f"{folder}: its {name} is {theirs}, this drafter's {own}; make them the same")
        for name, parameter in drafter.named_parameters():
            if name == _W2:
                parameter.copy_(_rows(checkpoint, config, vocabulary_ids, parameter))
                continue
            if name == _CONFIDENCE and name in checkpoint.names():
                parameter.copy_(_widened(checkpoint.tensor(name).float(), config, drafter, parameter))
                continue
            if name not in checkpoint.names() or checkpoint.shape(name) != tuple(parameter.shape):
                found = list(checkpoint.shape(name)) if name in checkpoint.names() else "missing"
                raise InvalidInputError(
                    f"{folder}: {name} is {found}, this drafter's is {list(parameter.shape)}; give a drafter of the "
                    "same layers, taps, heads and rank"
                )
            parameter.copy_(checkpoint.tensor(name).float())
    drafter.fc.weight /= drafter.feature_scale  # a checkpoint's fc holds its scale


def _rows(
    checkpoint: Checkpoint, config: DrafterConfig, vocabulary_ids: np.ndarray | None, parameter: torch.Tensor
) -> torch.Tensor:
    """W2 [P, r] for this draft vocabulary."""
    stored = checkpoint.tensor(_W2).float()
    if stored.shape[1] != parameter.shape[1]:
        raise InvalidInputError(
            f"{checkpoint.source}: its markov_rank is {stored.shape[1]}, this drafter's {parameter.shape[1]}"
        )
    whole = torch.zeros(config.backbone.vocab_size, stored.shape[1])
    whole[read_draft_vocab_ids(checkpoint, config) if config.draft_vocab_size else slice(None)] = stored
    return whole if vocabulary_ids is None else whole[torch.from_numpy(vocabulary_ids)]


def _widened(
    stored: torch.Tensor, config: DrafterConfig, drafter: TrainableDrafter, parameter: torch.Tensor
) -> torch.Tensor:
    """A confidence head's weight [1, inputs], with zeros for inputs that it gains."""
    gained = drafter.config.confidence_with_draft_probs and not config.confidence_with_draft_probs
    missing = PEAK_FEATURES if gained else 0
    if stored.shape[1] + missing != parameter.shape[1]:
        raise InvalidInputError(
            f"its {_CONFIDENCE} is {list(stored.shape)}, this drafter's is {list(parameter.shape)}; give a drafter "
            "whose confidence head sees the same"
        )
    return torch.nn.functional.pad(stored, (0, missing))
