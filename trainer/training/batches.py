"""Batches of blocks: which sequences a step sees, and where their anchors are.

Everything random is a function of the seed, the epoch and the step, so that a run that is resumed, or spread over
several processes, sees what the uninterrupted one would have.

Shapes: B sequences, S tokens, A anchors a sequence, γ block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence

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


@lru_cache(maxsize=2)
def _order(lengths: tuple[int, ...], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """`epoch_order`, once an epoch: of a hundred thousand sequences it takes longer than a step."""
    return epoch_order(lengths, batch, seed, epoch)


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


def batch_of_step(lengths: tuple[int, ...], batch: int, seed: int, step: int) -> tuple[int, list[int]]:
    """The epoch of a step, and the sequences that it sees."""
    each = len(lengths) // batch  # buckets are whole batches: only the last one leaves something out
    epoch = step // each
    return epoch, _order(lengths, batch, seed, epoch)[step % each]


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
    """Pad sequences and anchors, and gather what the loss needs of each block.

    Features are padded where they lie: those that were computed on the device stay there.
    """
    batch, most = len(examples), max(len(chosen) for chosen in anchors)
    positions = np.zeros((batch, most), dtype=np.int64)
    before = np.zeros((batch, most, block), dtype=np.int64)  # positions of x₀ … x_{γ−1}
    previous, labels = np.zeros_like(before), np.zeros_like(before)
    valid = np.zeros((batch, most, block), dtype=bool)
    offsets = np.arange(block)
    for row, (example, chosen) in enumerate(zip(examples, anchors, strict=True)):
        count, last = len(chosen), len(example) - 1
        behind = chosen[:, None] + offsets
        positions[row, :count] = chosen
        valid[row, :count] = behind + 1 < block_ends(example, chosen)[:, None]
        before[row, :count] = np.minimum(behind, last)
        previous[row, :count] = example.token_ids[before[row, :count]]
        labels[row, :count] = example.token_ids[np.minimum(behind + 1, last)]
    greedy = np.array([example.greedy for example in examples])
    taps, hidden, normalizers = (
        _pad(parts, device)
        for parts in zip(*((found.taps, found.hidden, found.log_normalizers) for found in features), strict=True)
    )
    moved = [
        torch.from_numpy(part).to(device, non_blocking=True)
        for part in (positions, previous[..., 0].copy(), previous, labels, valid, before, greedy)
    ]
    rows = torch.arange(batch, device=device)[:, None, None]
    *blocks, places, drawn = moved
    return Batch(taps, *blocks, hidden[rows, places], normalizers[rows, places], drawn)


def _pad(parts: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """[B, S, …] on the device; what lies on the host is padded there and moved as a whole."""
    if any(part.device != parts[0].device for part in parts):
        parts = [part.to(device) for part in parts]
    return pad_sequence(list(parts), batch_first=True).to(device, non_blocking=True)
