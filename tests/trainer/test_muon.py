"""Muon: orthogonal updates of one size, and a step that can be followed by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="training needs the [train] extra")

import torch

from dspark_edge.trainer.training.muon import Muon, _by_gram, _by_products, orthogonalize

pytestmark = pytest.mark.needs_export


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.3


def test_singular_vectors_stay() -> None:
    """Along the direction of each singular pair the result is near 1, across them near 0."""
    generator = torch.Generator().manual_seed(2)
    left, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(8, 8, generator=generator))
    matrix = left @ torch.diag(torch.tensor([5.0, 3.0, 2.0, 1.5, 1.0])) @ right[:, :5].T
    turned = left.T @ orthogonalize(matrix) @ right[:, :5]
    across = turned - torch.diag(turned.diagonal())
    assert across.abs().max() < 1e-3
    assert turned.diagonal().min() > 0.5


@pytest.mark.parametrize("steps", [0, 1, 3, 5])
def test_both_ways_are_one(steps: int) -> None:
    matrix = torch.randn((6, 20), generator=torch.Generator().manual_seed(3))
    matrix /= matrix.norm()
    torch.testing.assert_close(_by_gram(matrix, steps), _by_products(matrix, steps), rtol=1e-4, atol=1e-5)


def test_nothing_comes_of_nothing() -> None:
    assert orthogonalize(torch.zeros(3, 4)).abs().max() == 0


def test_a_step() -> None:
    parameter = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    optimizer = Muon([parameter], lr=0.1, momentum=0.5, weight_decay=0.5)
    parameter.grad = torch.diag(torch.tensor([4.0, 4.0]))
    optimizer.step()
    update = orthogonalize(torch.eye(2))
    expected = torch.eye(2) * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 2**0.5 * update
    torch.testing.assert_close(parameter.detach(), expected)
    torch.testing.assert_close(optimizer.state[parameter]["momentum_buffer"], torch.eye(2) * 2.0)


def test_a_parameter_without_a_gradient_stays() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    Muon([parameter], lr=1.0).step()
    assert torch.equal(parameter.detach(), torch.ones(2, 2))
