"""With what, and on what, something was measured."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dspark_edge.engines.machine import installed_version, probe_processor

__all__ = ["machine_facts", "versions_of"]


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Of Python, and of those packages that are installed."""
    found = {package: installed_version(package) for package in packages}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def machine_facts() -> dict[str, Any]:
    """Processor, architecture, and the cores that this process may use."""
    processor = probe_processor(Path("/"))
    return {"processor": processor.model, "architecture": processor.architecture, "cores": processor.usable_cores}
