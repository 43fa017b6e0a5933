"""What is computed in bf16 and what in fp32, on devices of all kinds."""

from __future__ import annotations

from types import MappingProxyType

import pytest

pytest.importorskip("torch", reason="computing in torch needs the [train] extra")

import torch

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.trainer.compute_types import autocast, pick_compute_type

pytestmark = pytest.mark.needs_export

CPU = torch.device("cpu")


def pretend(monkeypatch: pytest.MonkeyPatch, **capabilities: object) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: MappingProxyType(capabilities))


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_cpu_with_bf16_instructions_uses_them(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    pretend(monkeypatch, architecture="any", **{name: True})
    assert pick_compute_type("auto", CPU) == torch.bfloat16
    assert pick_compute_type("fp32", CPU) == torch.float32


@pytest.mark.parametrize("capabilities", [{}, {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}])
def test_any_other_cpu_computes_in_fp32(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool]) -> None:
    pretend(monkeypatch, **capabilities)
    assert pick_compute_type("auto", CPU) == torch.float32
    assert pick_compute_type("bf16", CPU) == torch.bfloat16  # slow, but asked for


def test_a_gpu_computes_in_bf16() -> None:
    assert pick_compute_type("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_compute_type("fp32", torch.device("cuda")) == torch.float32


def test_another_type_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="compute_type is 'fp8', expected one of: auto, fp32, bf16"):
        pick_compute_type("fp8", CPU)


def test_autocast_is_for_bf16_alone() -> None:
    weights, states = torch.ones(2, 3), torch.ones(1, 3)
    for dtype in (torch.float32, torch.bfloat16):
        with autocast(CPU, dtype):
            assert torch.nn.functional.linear(states, weights).dtype == dtype
