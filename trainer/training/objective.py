"""From a batch to the loss, and to what a drafter would have been accepted for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from dspark_edge.trainer.training.batches import Batch
from dspark_edge.trainer.training.drafter_model import Blocks
from dspark_edge.trainer.training.loss import LossWeights, draft_loss, position_weights

__all__ = ["CONFIDENCE_TARGETS", "Measures", "Vocabulary", "evaluate_blocks", "step_loss"]

CONFIDENCE_TARGETS = ("overlap", "outcome")
"""overlap: the chance that sampling accepts the draft, 1 − ½‖draft_probs − target_probs‖₁ (the reference's); outcome:
in greedy responses whether the draft's likeliest token is the one that came, as greedy decoding accepts, and in others
the overlap."""


@dataclass(frozen=True)
class Vocabulary:
    """The target's embedding and head as the drafter uses them, on its device."""

    embedding: torch.Tensor  # [V, d]
    head: torch.Tensor  # [P, d]
    rows: torch.Tensor  # [V] int64: a token's row in the head, −1 where it has none
    mask_token_id: int

    def embed(self, anchor_ids: torch.Tensor) -> torch.Tensor:
        """anchor_ids [B, A] → embeddings of the anchors and of the mask token [B, A, 2, d]."""
        both = torch.stack((anchor_ids, torch.full_like(anchor_ids, self.mask_token_id)), dim=-1)
        return functional.embedding(both, self.embedding)


@dataclass(frozen=True, slots=True)
class Measures:
    """Of one batch; sums over its draft positions."""

    loss: torch.Tensor  # scalar, differentiable
    weight: torch.Tensor  # scalar, Σ w_k
    cross_entropy: torch.Tensor  # Σ w_k · cross-entropy
    overlap: torch.Tensor  # Σ w_k · (1 − ½‖draft_probs − target_probs‖₁)
    confidence_loss: torch.Tensor  # Σ w_k · BCE
    acceptance: torch.Tensor  # [B, A, γ], 1 − ½‖·‖₁, 0 where not valid
    correct: torch.Tensor  # [B, A, γ] bool, the draft's argmax is the token that came


def step_loss(
    drafter: nn.Module,
    vocabulary: Vocabulary,
    batch: Batch,
    markov_w2: torch.Tensor | None,
    parts: LossWeights | None = None,
    regression_weight: float = 0.0,
    confidence_target: str = "overlap",
    peak_weights: torch.Tensor | None = None,
) -> Measures:
    """One forward pass (reference: 0.1 cross-entropy + 0.9 ‖·‖₁ + 1.0 BCE of the confidence, weighted by position).

    Args:
        drafter: a TrainableDrafter, or a wrapper around one.
        vocabulary: what is shared with the target.
        batch: blocks.
        markov_w2: the drafter's W2 [P, r], None without a sequential head.
        parts: see `draft_loss`.
        regression_weight: of the squared distance to the target's hidden states, relative to their size (the feature
            loss of EAGLE). Not part of the reference's loss.
        confidence_target: what confidences shall say, one of `CONFIDENCE_TARGETS`.
        peak_weights: [3] of the confidence head, see `TrainableDrafter.peak_weights`.
    """
    blocks: Blocks = drafter(batch.features, vocabulary.embed(batch.anchor_ids), batch.anchors, batch.previous_ids)
    weights = position_weights(batch.valid.shape[-1]).to(batch.valid.device)
    chosen = batch.valid.reshape(-1).nonzero().squeeze(1)
    row_weights = weights.expand(batch.valid.shape).reshape(-1)[chosen]
    total = row_weights.sum()
    dtype = blocks.hidden.dtype
    rows = draft_loss(
        blocks.hidden.flatten(0, 2)[chosen],
        None if blocks.markov is None else blocks.markov.flatten(0, 2)[chosen],
        markov_w2,
        vocabulary.head.to(dtype),
        batch.target_hidden.flatten(0, 2)[chosen].to(dtype),
        batch.log_normalizers.reshape(-1)[chosen],
        vocabulary.rows[batch.label_ids.reshape(-1)[chosen]],
        row_weights,
        parts,
        with_peaks=peak_weights is not None,
    )
    acceptance = (1.0 - 0.5 * rows.distances).clamp(0.0, 1.0)
    wanted = acceptance if confidence_target == "overlap" else _outcomes(batch, chosen, rows.correct, acceptance)
    more = None if rows.peaks is None or peak_weights is None else rows.peaks @ peak_weights
    confidence_loss = _confidence_loss(blocks, chosen, wanted, row_weights, more)
    loss = rows.loss + confidence_loss
    if regression_weight:
        loss = loss + regression_weight * _feature_loss(blocks, batch, chosen, row_weights)
    # What is not in the loss keeps its place in the graph: processes that share gradients expect all of them.
    loss = loss + 0.0 * sum(part.sum() for part in (blocks.hidden, blocks.markov) if part is not None)
    spread = torch.zeros(batch.valid.numel(), device=loss.device)
    hits = torch.zeros(batch.valid.numel(), dtype=torch.bool, device=loss.device)
    return Measures(
        loss,
        total,
        rows.cross_entropy,
        (row_weights * acceptance).sum(),
        confidence_loss.detach(),
        spread.index_copy(0, chosen, acceptance).reshape(batch.valid.shape),
        hits.index_copy(0, chosen, rows.correct).reshape(batch.valid.shape),
    )


def _confidence_loss(
    blocks: Blocks,
    chosen: torch.Tensor,
    wanted: torch.Tensor,
    row_weights: torch.Tensor,
    more: torch.Tensor | None,
) -> torch.Tensor:
    """Σ w_k · BCE of the confidences of the chosen rows, [N]; zero where the drafter has none.

    Args:
        more: [N] logits, what the drafts' distributions add.
    """
    if blocks.confidence_logits is None:
        return torch.zeros((), device=row_weights.device)
    logits = blocks.confidence_logits.reshape(-1)[chosen].float()
    if more is not None:
        logits = logits + more
    return functional.binary_cross_entropy_with_logits(logits, wanted, row_weights, reduction="sum")


def _feature_loss(blocks: Blocks, batch: Batch, chosen: torch.Tensor, row_weights: torch.Tensor) -> torch.Tensor:
    """Σ w_k · the mean squared distance to the target's hidden states, relative to their size."""
    states = batch.target_hidden.flatten(0, 2)[chosen].float()
    distance = (blocks.hidden.flatten(0, 2)[chosen].float() - states).square().mean(dim=-1)
    return (row_weights * distance).sum() / states.square().mean()


def _outcomes(batch: Batch, chosen: torch.Tensor, correct: torch.Tensor, acceptance: torch.Tensor) -> torch.Tensor:
    """What confidences in the outcome shall say of the chosen rows, [N]; see `CONFIDENCE_TARGETS`."""
    greedy = batch.greedy[:, None, None].expand(batch.valid.shape).reshape(-1)[chosen]
    return torch.where(greedy, correct.to(acceptance.dtype), acceptance)


def evaluate_blocks(measures: Measures, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimated accepted lengths of blocks that lie wholly inside their response.

    Args:
        measures: of the batch.
        batch: its blocks. In greedy responses tokens themselves are compared, as greedy decoding would; in others
            the probability of being accepted is used.

    Returns:
        τ at temperature 0 of every whole block of a greedy response [n₀], and at temperature 1 of every whole block
        [n₁]: 1 + Σ_k ∏_{i≤k} acceptance_i, given the tokens that came.
    """
    whole = batch.valid.all(dim=-1)
    survived = measures.correct.float().cumprod(dim=-1).sum(dim=-1) + 1.0
    expected = measures.acceptance.cumprod(dim=-1).sum(dim=-1) + 1.0
    return survived[whole & batch.greedy[:, None]], expected[whole]
