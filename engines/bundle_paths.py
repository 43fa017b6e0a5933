"""Paths inside a bundle: which are allowed, and which the manifest records."""

from __future__ import annotations

import re

from dspark_edge.engines.errors import BundleError

__all__ = ["MANIFEST_NAME", "check_path", "is_recorded"]

MANIFEST_NAME = "manifest.json"

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def check_path(path: str, where: str) -> str:
    """``path`` itself, if it is relative, normalised and stays inside the bundle.

    Raises:
        BundleError: it does not; ``where`` names what holds the path.
    """
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or "\\" in path or path[1:2] == ":":
        raise BundleError(f"{where} is {path!r}, which points outside its folder; do not trust this bundle")
    if any(part in ("", ".") for part in parts) or _UNPRINTABLE.search(path):
        raise BundleError(f"{where} is {path!r}; expected a normalised relative path such as 'target.onnx'")
    return path


def is_recorded(path: str) -> bool:
    """Whether the manifest records a file of this path: all but itself and what is written after export."""
    return path not in (MANIFEST_NAME, "calibration.json", "devices") and not path.startswith("devices/")
