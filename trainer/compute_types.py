"""In which type the target and the drafter are computed while responses are written and a drafter is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dspark_edge.engines.errors import InvalidInputError

if TYPE_CHECKING:  # the names are also read by commands that run without torch
    import torch

__all__ = ["COMPUTE_TYPES", "autocast", "check_compute_type", "pick_compute_type"]

COMPUTE_TYPES = ("auto", "fp32", "bf16")
"""auto: bf16 where the device multiplies it faster than fp32, which GPUs and newer CPUs do."""

# Of torch.cpu.get_capabilities(): AVX512-BF16, AMX, and Arm's BF16 extension. Others can compute in bf16, but slowly.
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


def check_compute_type(wanted: str) -> None:
    """Refuse what is none of `COMPUTE_TYPES`.

    Raises:
        InvalidInputError: `wanted` is none of `COMPUTE_TYPES`.
    """
    if wanted not in COMPUTE_TYPES:
        raise InvalidInputError(f"compute_type is {wanted!r}, expected one of: {', '.join(COMPUTE_TYPES)}")


def pick_compute_type(wanted: str, device: torch.device) -> torch.dtype:
    """The type that `wanted` means on a device.

    Raises:
        InvalidInputError: `wanted` is none of `COMPUTE_TYPES`.
    """
    import torch

    check_compute_type(wanted)
    if wanted == "auto":
        wanted = "bf16" if device.type != "cpu" or _cpu_has_bf16() else "fp32"
    return torch.bfloat16 if wanted == "bf16" else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """For bf16: products in it, sums and norms in fp32. For fp32: nothing."""
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def _cpu_has_bf16() -> bool:
    import torch

    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in _BF16_INSTRUCTIONS)
