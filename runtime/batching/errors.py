"""Errors of serving many requests; in the tree of `dspark_edge.engines.errors`."""

from __future__ import annotations

from dspark_edge.engines.errors import DSparkError

__all__ = ["ClosedError", "QueueFullError"]


class QueueFullError(DSparkError):
    """As many requests wait as may. Nothing is wrong with the request: send it again later (HTTP 429)."""


class ClosedError(DSparkError):
    """The generator was closed before the request's end, or before it was sent."""
