"""How much memory there is, and how it is written."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

from dspark_edge.engines.machine import probe_memory

__all__ = ["available_memory", "format_bytes", "peak_memory"]


def available_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device."""
    if device.type == "cuda":
        # What torch's allocator holds back of freed tensors is free, too, though the driver does not know.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + unused)
    free = probe_memory(Path("/")).available
    return sys.maxsize if free is None else free


def peak_memory(device: torch.device) -> int:
    """Most bytes this process has held: resident on a CPU, allocated by torch on a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def format_bytes(size: float) -> str:
    """1536 → "1.5 kB"; decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
