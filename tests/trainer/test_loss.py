"""The fused loss against its formula, differentiated by torch."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="training needs the [train] extra")

import torch
from torch.nn import functional

from dspark_edge.trainer.training import loss
from dspark_edge.trainer.training.loss import LossWeights, draft_loss, position_weights

pytestmark = pytest.mark.needs_export

ROWS, SIZE, RANK, VOCABULARY, DRAFTED = 13, 8, 3, 40, 17


def tensors(rank: int = RANK, drafted: int = DRAFTED) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    full_head = normal(VOCABULARY, SIZE)
    target_hidden = normal(ROWS, SIZE)
    labels = torch.randint(-1, drafted, (ROWS,), generator=generator)
    labels[0] = -1
    return {
        "hidden": normal(ROWS, SIZE).requires_grad_(),
        "markov": normal(ROWS, rank).requires_grad_() if rank else None,
        "markov_w2": normal(drafted, rank).requires_grad_() if rank else None,
        "head": full_head[:drafted],
        "target_hidden": target_hidden,
        "log_normalizers": torch.logsumexp(target_hidden @ full_head.T, dim=-1),
        "labels": labels,
        "weights": torch.rand(ROWS, generator=generator),
    }


def by_formula(given: dict[str, Any], divergence: float = 0.0, share: float = 0.1) -> tuple[Any, Any]:
    """0.1 · cross-entropy + 0.9 · ‖draft_probs − target_probs‖₁ over the whole vocabulary."""
    logits = given["hidden"] @ given["head"].T
    if given["markov"] is not None:
        logits = logits + given["markov"] @ given["markov_w2"].T
    probs = torch.softmax(logits, dim=-1)
    target = torch.exp(given["target_hidden"] @ given["head"].T - given["log_normalizers"][:, None])
    outside = 1 - target.sum(dim=-1)  # the draft gives nothing to tokens outside its vocabulary
    distances = (probs - target).abs().sum(dim=-1) + outside
    known = given["labels"] >= 0
    entropy = functional.cross_entropy(logits, given["labels"].clamp(min=0), reduction="none") * known
    soft = -(target * torch.log_softmax(logits, dim=-1)).sum(dim=-1)
    return (given["weights"] * (share * entropy + 0.9 * distances + divergence * soft)).sum(), distances


@pytest.mark.parametrize("rank", [RANK, 0])
@pytest.mark.parametrize("drafted", [DRAFTED, VOCABULARY])
@pytest.mark.parametrize("piece", [1, 5 * DRAFTED, 1 << 21])
@pytest.mark.parametrize(("divergence", "entropy"), [(0.0, 0.1), (0.7, 0.1), (0.0, 0.5)])
def test_loss_and_gradients_are_those_of_the_formula(
    monkeypatch: pytest.MonkeyPatch, rank: int, drafted: int, piece: int, divergence: float, entropy: float
) -> None:
    monkeypatch.setattr(loss, "_PIECE_ELEMENTS", piece)
    given, again = tensors(rank, drafted), tensors(rank, drafted)
    found = draft_loss(**given, parts=LossWeights(entropy, divergence=divergence))
    expected, distances = by_formula(again, divergence, entropy)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.distances, distances.detach())
    (3.0 * found.loss).backward()
    (3.0 * expected).backward()
    for name in ("hidden", "markov", "markov_w2"):
        if given[name] is not None:
            torch.testing.assert_close(given[name].grad, again[name].grad, atol=1e-5, rtol=1e-4)


def test_a_draft_that_is_the_target_has_no_distance() -> None:
    given = tensors(rank=0, drafted=VOCABULARY)
    given["hidden"] = given["target_hidden"].clone().requires_grad_()
    found = draft_loss(**given)
    assert found.distances.abs().max() < 1e-5


def test_correct_is_the_argmax_that_came() -> None:
    given = tensors()
    logits = given["hidden"] @ given["head"].T + given["markov"] @ given["markov_w2"].T
    given["labels"] = logits.argmax(dim=-1)
    given["labels"][3] = (given["labels"][3] + 1) % DRAFTED
    given["labels"][4] = -1
    found = draft_loss(**given)
    assert found.correct.tolist() == [row not in (3, 4) for row in range(ROWS)]


def test_positions_weigh_less_the_later_they_are() -> None:
    assert position_weights(3).tolist() == pytest.approx([1.0, 0.7788, 0.6065], abs=1e-4)


def test_of_the_drafts_distributions_is_told_what_the_graph_sees() -> None:
    given = tensors()
    found = draft_loss(**given, with_peaks=True)
    logits = (given["hidden"] @ given["head"].T + given["markov"] @ given["markov_w2"].T).detach()
    best = logits.sort(dim=-1, descending=True).values[:, :16]
    probs = torch.softmax(best, dim=-1)[:, 0]
    assert found.peaks is not None and not found.peaks.requires_grad
    torch.testing.assert_close(found.peaks, torch.stack((probs.log(), best[:, 0] - best[:, 1], probs), dim=-1))
    assert draft_loss(**given).peaks is None
