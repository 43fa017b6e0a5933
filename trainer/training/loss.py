"""The training loss, without ever holding logits of all rows.

A row's logits are as wide as the vocabulary, a step has thousands of rows. So the loss takes the hidden states, makes
logits piece by piece, and forms the gradients to the hidden states, the Markov features and W2 in the same visit
(the idea of fused linear cross-entropy kernels): memory is a piece, and nothing is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from dspark_edge.exporter.modules.drafter import PEAK_FEATURES, PEAK_LOGITS, peak_features

__all__ = ["LossWeights", "RowLosses", "draft_loss", "position_weights"]

# Rows of a piece: its logits, probabilities and gradients stay in a processor's cache.
_PIECE_ELEMENTS = 1 << 21


@dataclass(frozen=True, slots=True)
class LossWeights:
    """What a row's loss is made of; as they stand, the reference's.

    The gradient of ‖draft_probs − target_probs‖₁ vanishes where the draft gives the target's tokens next to nothing,
    which is everywhere at first. So a third term can help it off: the cross-entropy with the target's whole
    distribution, whose gradient is largest there.
    """

    cross_entropy: float = 0.1  # with the token that came
    total_variation: float = 0.9  # ‖draft_probs − target_probs‖₁
    divergence: float = 0.0  # cross-entropy with target_probs; not part of the reference's loss


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Of each row, and their weighted sum."""

    loss: torch.Tensor  # scalar, differentiable: Σ weight · loss of the row, see `LossWeights`
    distances: torch.Tensor  # [N] ‖draft_probs − target_probs‖₁, for the confidence's labels
    correct: torch.Tensor  # [N] bool, the draft's argmax is the token that came
    cross_entropy: torch.Tensor  # scalar, Σ weight · cross-entropy
    peaks: torch.Tensor | None = None  # [N, 3], `peak_features` of the drafts' distributions, if they were asked for


def position_weights(block: int) -> torch.Tensor:
    """w_k = exp(−(k−1)/4), [γ]."""
    return torch.exp(-torch.arange(block) / 4.0)


class _Piece:
    """Some rows' logits, and what follows from them; its arrays are used up as the gradient is made.

    Args:
        logits: [n, P] fp32, the draft's.
        target: [n, P] fp32, the target's probabilities of the draft vocabulary.
        labels: [n] int64, −1 outside the draft vocabulary.
        parts: weights of the loss's terms.
    """

    def __init__(self, logits: torch.Tensor, target: torch.Tensor, labels: torch.Tensor, parts: LossWeights) -> None:
        self._parts, self._target = parts, target
        self._known, self._chosen = labels >= 0, labels.clamp(min=0)[:, None]
        self._probs = torch.softmax(logits, dim=-1)
        self.correct = logits.argmax(dim=-1) == labels
        self.entropy = -torch.log(self._probs.gather(1, self._chosen).squeeze(1).clamp(min=1e-30)) * self._known
        # Tokens outside the draft vocabulary: the draft gives them nothing, so all of their mass is missed.
        self._held = target.sum(dim=-1)
        difference = self._probs - target
        self._sign = torch.sign(difference)
        self.distance = difference.abs_().sum(dim=-1) + (1.0 - self._held).clamp(min=0)
        self.loss = parts.cross_entropy * self.entropy + parts.total_variation * self.distance
        if parts.divergence:
            self.loss -= parts.divergence * (target * torch.log_softmax(logits, dim=-1)).sum(dim=-1)

    def gradient(self) -> torch.Tensor:
        """Of the loss by the logits, [n, P]."""
        parts, probs = self._parts, self._probs
        # d‖·‖₁/dz = draft_probs ⊙ (sign − ⟨draft_probs, sign⟩);  d(cross-entropy)/dz = draft_probs − onehot
        sign = self._sign
        sign -= (probs * sign).sum(dim=-1, keepdim=True)
        sign *= parts.total_variation
        sign += (parts.cross_entropy * self._known)[:, None]
        gradient = sign.mul_(probs)
        if parts.divergence:  # d(soft cross-entropy)/dz = draft_probs · Σ target_probs − target_probs
            gradient += parts.divergence * (probs * self._held[:, None] - self._target)
        return gradient.scatter_add_(1, self._chosen, -(parts.cross_entropy * self._known.float())[:, None])


class _DraftLoss(torch.autograd.Function):
    """See `draft_loss`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        markov: torch.Tensor,
        markov_w2: torch.Tensor,
        head: torch.Tensor,
        target_hidden: torch.Tensor,
        log_normalizers: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        parts: LossWeights,
        with_peaks: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        rows, width = hidden.shape[0], head.shape[0]
        grad_hidden, grad_markov = torch.empty_like(hidden), torch.empty_like(markov)
        grad_w2 = torch.zeros_like(markov_w2)
        distances = torch.empty(rows, device=hidden.device)
        correct = torch.empty(rows, dtype=torch.bool, device=hidden.device)
        cross_entropy = torch.zeros((), device=hidden.device)
        peaks = torch.empty((rows, PEAK_FEATURES if with_peaks else 0), device=hidden.device)
        total = torch.zeros((), device=hidden.device)
        step = max(1, _PIECE_ELEMENTS // width) if hidden.device.type == "cpu" else max(1, (1 << 28) // width)
        for start in range(0, rows, step):
            piece = slice(start, start + step)
            logits = functional.linear(hidden[piece], head).float()
            if markov.shape[1]:
                logits += functional.linear(markov[piece], markov_w2)
            if with_peaks:
                peaks[piece] = peak_features(logits.topk(min(PEAK_LOGITS, width), dim=-1).values)
            target = functional.linear(target_hidden[piece], head).float()
            target = target.sub_(log_normalizers[piece, None]).exp_()
            found = _Piece(logits, target, labels[piece], parts)
            weight = weights[piece]
            total += (weight * found.loss).sum()
            cross_entropy += (weight * found.entropy).sum()
            distances[piece], correct[piece] = found.distance, found.correct
            gradient = found.gradient()
            gradient *= weight[:, None]
            grad_hidden[piece] = (gradient.to(head.dtype) @ head).to(hidden.dtype)
            if markov.shape[1]:
                grad_markov[piece] = (gradient @ markov_w2).to(markov.dtype)
                grad_w2 += gradient.T @ markov[piece].float()
        ctx.save_for_backward(grad_hidden, grad_markov, grad_w2)
        ctx.mark_non_differentiable(distances, correct, cross_entropy, peaks)
        return total, distances, correct, cross_entropy, peaks

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, grad_markov, grad_w2 = ctx.saved_tensors
        scale = gradients[0]
        return grad_hidden * scale, grad_markov * scale, grad_w2 * scale, None, None, None, None, None, None, None


def draft_loss(
    hidden: torch.Tensor,
    markov: torch.Tensor | None,
    markov_w2: torch.Tensor | None,
    head: torch.Tensor,
    target_hidden: torch.Tensor,
    log_normalizers: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor,
    parts: LossWeights | None = None,
    with_peaks: bool = False,
) -> RowLosses:
    """Loss of N draft positions (reference: 0.1 · cross-entropy + 0.9 · ‖draft_probs − target_probs‖₁).

    Args:
        hidden: [N, d], the drafter's, behind its final norm.
        markov: [N, r] or None, what W2 projects on the vocabulary.
        markov_w2: [P, r] or None.
        head: [P, d], the target's head, of the draft vocabulary; frozen.
        target_hidden: [N, d], the target's, behind its final norm, at the position before the one that is drafted.
        log_normalizers: [N] fp32, the logarithm of the sum of the target's exponentiated logits, whole vocabulary.
        labels: [N] int64, the token that came, as its row in the draft vocabulary; −1 where it is outside.
        weights: [N] fp32.
        parts: weights of the loss's terms; None: the reference's.
        with_peaks: whether to tell of the drafts' distributions what a confidence head sees of them.
    """
    if markov is None or markov_w2 is None:
        markov, markov_w2 = hidden.new_zeros((hidden.shape[0], 0)), hidden.new_zeros((head.shape[0], 0))
    loss, distances, correct, cross_entropy, peaks = _DraftLoss.apply(
        hidden,
        markov,
        markov_w2,
        head,
        target_hidden,
        log_normalizers,
        labels,
        weights,
        parts or LossWeights(),
        with_peaks,
    )
    return RowLosses(loss, distances, correct, cross_entropy, peaks if with_peaks else None)
