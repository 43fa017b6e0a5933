"""Batches of blocks: which sequences a step sees, and where their anchors are.

Everything random is a function of the seed, the epoch and the step, so that a run that is resumed, or spread over
several processes, sees what the uninterrupted one would have.

Shapes: B sequences, S tokens, A anchors a sequence, γ block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from dspark_edge.trainer.training.dataset import Example
from dspark_edge.trainer.training.features import Features

__all__ = ["Batch", "batch_of_step", "block_ends", "collate", "draw_anchors", "epoch_order"]

# Sequences are sorted by length within so many batches, so that little of a batch is padding.
_BUCKET_BATCHES = 32


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks of some sequences, on a device."""

    features: torch.Tensor  # [B, S, T·d]
    anchors: torch.Tensor  # [B, A] int64, positions
    anchor_ids: torch.Tensor  # [B, A] int64
    previous_ids: torch.Tensor  # [B, A, γ] int64, x₀ … x_{γ−1}
    label_ids: torch.Tensor  # [B, A, γ] int64, x₁ … x_γ
    valid: torch.Tensor  # [B, A, γ] bool, positions inside the response
    target_hidden: torch.Tensor  # [B, A, γ, d], the target's state that x_k was drawn from
    log_normalizers: torch.Tensor  # [B, A, γ] fp32
    greedy: torch.Tensor  # [B] bool, the responses that are greedy


def epoch_order(lengths: Sequence[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch: a permutation, sorted by length in buckets, the batches shuffled again.

    What does not fill a last batch is left out of this epoch.
    """
    random = np.random.default_rng((seed, 1, epoch))
    order = random.permutation(len(lengths))
    batches: list[list[int]] = []
    size = batch * _BUCKET_BATCHES
    for start in range(0, len(order), size):
        bucket = sorted(order[start : start + size].tolist(), key=lambda index: lengths[index])
        batches += [bucket[at : at + batch] for at in range(0, len(bucket) - batch + 1, batch)]
    return [batches[index] for index in random.permutation(len(batches))]


def batch_of_step(lengths: Sequence[int], batch: int, seed: int, step: int) -> tuple[int, list[int]]:
    """The epoch of a step, and the sequences that it sees."""
    each = len(lengths) // batch  # buckets are whole batches: only the last one leaves something out
    epoch = step // each
    return epoch, epoch_order(lengths, batch, seed, epoch)[step % each]


def draw_anchors(
    example: Example, count: int, random: np.random.Generator, prompt_share: float = 0.0
) -> npt.NDArray[np.int64]:
    """Positions that have at least one token behind them, ascending [A].

    Args:
        example: a prompt with its response.
        count: most positions.
        random: draws them.
        prompt_share: so much of the count is drawn from the prompt, the rest from the answers.
    """
    wanted = round(count * prompt_share)
    answered = np.concatenate([np.arange(first, end - 1) for first, end in example.answers])
    asked = np.arange(1, example.prompt_length)
    if example.earlier:
        asked = np.setdiff1d(asked, np.concatenate([np.arange(first, end) for first, end in example.earlier]))
    chosen = np.concatenate((_choose(asked, wanted, random), _choose(answered, count - wanted, random)))
    return np.sort(chosen)


def block_ends(example: Example, anchors: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Behind which position each anchor's block has nothing to learn from, [A]: its answer's end."""
    ends = np.full(len(anchors), len(example), dtype=np.int64)
    for first, end in example.earlier:
        ends[(anchors >= first) & (anchors < end)] = end
    return ends


def _choose(choices: npt.NDArray[np.int64], count: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """At most `count` of the choices, ascending."""
    if len(choices) > count:
        choices = np.sort(random.choice(choices, size=count, replace=False))
    return choices


def collate(
    examples: Sequence[Example],
    features: Sequence[Features],
    anchors: Sequence[npt.NDArray[np.int64]],
    block: int,
    device: torch.device,
) -> Batch:
    """Pad sequences and anchors, and gather what the loss needs of each block."""
    batch, most = len(examples), max(len(chosen) for chosen in anchors)
    longest = max(len(example) for example in examples)
    padded = torch.zeros((batch, longest, features[0].taps.shape[1]), dtype=features[0].taps.dtype)
    positions = torch.zeros((batch, most), dtype=torch.int64)
    previous = torch.zeros((batch, most, block), dtype=torch.int64)
    labels = torch.zeros((batch, most, block), dtype=torch.int64)
    valid = torch.zeros((batch, most, block), dtype=torch.bool)
    hidden = torch.zeros((batch, most, block, features[0].hidden.shape[1]), dtype=features[0].hidden.dtype)
    normalizers = torch.zeros((batch, most, block))
    offsets = torch.arange(block)
    for row, (example, found, chosen) in enumerate(zip(examples, features, anchors, strict=True)):
        count, length = len(chosen), len(example)
        token_ids = torch.from_numpy(example.token_ids.astype(np.int64))
        starts = torch.from_numpy(chosen)
        padded[row, :length] = found.taps
        positions[row, :count] = starts
        before = starts[:, None] + offsets  # positions of x₀ … x_{γ−1}
        inside = before + 1 < torch.from_numpy(block_ends(example, chosen))[:, None]
        before = before.clamp(max=length - 1)
        previous[row, :count] = token_ids[before]
        labels[row, :count] = token_ids[(before + 1).clamp(max=length - 1)]
        valid[row, :count] = inside
        hidden[row, :count] = found.hidden[before]
        normalizers[row, :count] = found.log_normalizers[before]
    greedy = torch.tensor([example.greedy for example in examples])
    moved = (
        part.to(device, non_blocking=True)
        for part in (padded, positions, previous[..., 0], previous, labels, valid, hidden, normalizers, greedy)
    )
    return Batch(*moved)
