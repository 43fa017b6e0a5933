"""Muon: momentum whose update is orthogonalised, for the matrices of hidden layers (Jordan et al. 2024).

A gradient's few large singular values would rule an update; orthogonalised, all directions move alike. Against AdamW
that takes fewer steps to the same loss, which counts where a step is dear. torch.optim.Muon computes in bfloat16,
for which CPUs without AVX-512 have no fast product; so this one works in the type of the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["Muon", "orthogonalize"]

# Quintic Newton-Schulz coefficients (Jordan et al.): steep at 0, so that few steps suffice; singular values end
# within 0.7 and 1.2, which serves as well as 1.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_WIDE = 1.5  # columns to rows, from which products of rows alone are cheaper


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U·Vᵀ of a matrix U·S·Vᵀ."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    current = wide / wide.norm().clamp(min=1e-7)
    current = (_by_gram if wide.shape[1] >= _WIDE * wide.shape[0] else _by_products)(current, steps)
    return current if matrix.shape[0] <= matrix.shape[1] else current.T


def _by_products(current: torch.Tensor, steps: int) -> torch.Tensor:
    """X ← (a + b·XXᵀ + c·(XXᵀ)²)·X, step by step."""
    first, second, third = _COEFFICIENTS
    for _ in range(steps):
        gram = current @ current.T
        current = torch.addmm(current, torch.addmm(gram, gram, gram, beta=second, alpha=third), current, beta=first)
    return current


def _by_gram(current: torch.Tensor, steps: int) -> torch.Tensor:
    """The same with products as narrow as the matrix is: a step's factor P is a polynomial of G = XXᵀ, and what the
    next step needs of X is P·G·P. Of 576 × 1536 this takes little more than half the time."""
    first, second, third = _COEFFICIENTS
    gram = current @ current.T
    product = None
    for step in range(steps):
        factor = torch.addmm(gram, gram, gram, beta=second, alpha=third)
        factor.diagonal().add_(first)
        product = factor if product is None else factor @ product
        if step + 1 < steps:
            gram = factor @ gram @ factor
    return current if product is None else product @ current


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    Args:
        parameters: matrices.
        lr: learning rate; an update has the root mean square 0.2 · lr that AdamW's usually have (Liu et al. 2025),
            so that one learning rate serves both.
        momentum: of the moving average of gradients.
        weight_decay: decoupled.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                buffer = state.setdefault("momentum_buffer", torch.zeros_like(gradient))
                buffer.lerp_(gradient, 1.0 - group["momentum"])
                update = orthogonalize(gradient.lerp(buffer, group["momentum"]))
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)
