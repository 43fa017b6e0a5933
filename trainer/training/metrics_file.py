"""The metrics of a run, one JSON object a step, and their plot."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.reporting.html_page import require_matplotlib
from dspark_edge.trainer.training.replacing_path import replacing_path

__all__ = ["PLOT", "MetricsFile", "plot_metrics", "read_metrics"]

PLOT = "the plot of a training run"
"""What matplotlib is asked for before a run begins: hours later would be late to hear that it is missing."""


class MetricsFile:
    """A JSON Lines file that agrees with the checkpoint: steps behind it are cut off when a run is resumed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending: list[str] = []

    def append(self, entry: Mapping[str, Any]) -> None:
        self._pending.append(json.dumps(entry) + "\n")
        if len(self._pending) >= 20:
            self.sync()

    def sync(self) -> None:
        """Write what is pending through to the disk."""
        if not self._pending:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as stream:
                stream.writelines(self._pending)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise InvalidInputError(f"cannot write {self._path}: {error.strerror or error}") from None
        self._pending.clear()

    def cut(self, step: int) -> None:
        """Keep whole lines up to a step."""
        kept = [entry for entry in read_metrics(self._path) if entry["step"] <= step]
        if self._path.exists():
            with replacing_path(self._path) as temporary:
                temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; none where there is no file."""
    entries: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue  # a line that a crash left behind
                if isinstance(entry, dict) and "step" in entry:
                    entries.append(entry)
    return entries


def plot_metrics(metrics: Path, picture: Path) -> None:
    """Loss and held-out accepted length over the steps, as PNG.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib(PLOT)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = read_metrics(metrics)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    steps = [entry["step"] for entry in entries]
    losses = [entry["loss"] for entry in entries]
    width = max(1, len(losses) // 100)
    smooth = [sum(losses[max(0, end - width) : end]) / min(width, end) for end in range(1, len(losses) + 1)]
    left.plot(steps, losses, color="0.8", linewidth=0.5)
    left.plot(steps, smooth)
    left.set(xlabel="step", ylabel="loss", title="training loss")
    for key, label in (("tau_greedy", "temperature 0"), ("tau_sampled", "temperature 1, expected")):
        points = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    right.set(xlabel="step", ylabel="accepted length τ", title="held-out responses")
    if right.get_legend_handles_labels()[0]:
        right.legend()
    with replacing_path(picture) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
