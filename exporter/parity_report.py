"""What `parity` reports: errors of every output, collected over many calls, and their verdict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from dspark_edge.engines.engine import HostArray

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["OutputErrors", "ParityReport", "ParityRow", "render"]


@dataclass(frozen=True, slots=True)
class ParityRow:
    """One output, over all calls."""

    name: str
    max_abs_error: float
    max_rel_error: float  # the largest error as a fraction of the reference's largest magnitude
    mean_abs_error: float
    top1_agreement: float | None  # fraction of rows with the same best token, of drafts or judgements that agree
    tolerance: float  # on max_abs_error, scaled up where the reference's largest magnitude is above 1
    passed: bool
    worst: str | None = None  # which of several tensors has the largest error


@dataclass(frozen=True, slots=True)
class ParityReport:
    """What `compare_bundle` found."""

    bundle: str
    lowering: str
    precision: str
    positions: int  # tokens that were compared
    rows: tuple[ParityRow, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    def to_json(self) -> dict[str, object]:
        """The report as JSON values; an error that is not finite is null."""
        rows = [
            {
                key: None if isinstance(value, float) and not math.isfinite(value) else value
                for key, value in row.items()
            }
            for row in map(asdict, self.rows)
        ]
        return {
            "bundle": self.bundle,
            "lowering": self.lowering,
            "precision": self.precision,
            "positions": self.positions,
            "passed": self.passed,
            "rows": rows,
        }


def render(report: ParityReport, console: Console) -> None:
    """Print a report as a table."""
    from rich.table import Table

    table = Table(title=f"{report.bundle}: {report.lowering}, {report.precision}, {report.positions} positions")
    table.add_column("output")
    for column in ("max abs", "max rel", "mean abs", "agreement", "tolerance"):
        table.add_column(column, justify="right")
    table.add_column("")
    for row in report.rows:
        agreement = "" if row.top1_agreement is None else f"{row.top1_agreement:.2%}"
        errors = (row.max_abs_error, row.max_rel_error, row.mean_abs_error)
        name = row.name if row.worst is None or row.passed else f"{row.name} (worst: {row.worst})"
        verdict = "[green]ok[/green]" if row.passed else "[red]FAILED[/red]"
        table.add_row(name, *(f"{error:.1e}" for error in errors), agreement, f"{row.tolerance:.0e}", verdict)
    console.print(table)


@dataclass(slots=True)
class OutputErrors:
    """Errors of one output, collected over calls."""

    name: str
    worst: str | None = None
    largest: float = 0.0
    magnitude: float = 0.0
    total: float = 0.0
    count: int = 0
    agreeing: int = 0
    ranked: int = 0

    def add(self, given: HostArray, expected: HostArray, what: str | None = None) -> None:
        """Compare two arrays of one shape; `what` names them where they are one of several."""
        if not expected.size:
            return
        wanted = np.asarray(expected, np.float64)
        errors = np.abs(np.asarray(given, np.float64) - wanted)
        errors = np.where(np.isnan(errors), np.inf, errors)
        if what is not None and (self.worst is None or errors.max() > self.largest):
            self.worst = what
        self.largest = max(self.largest, float(errors.max()))
        self.magnitude = max(self.magnitude, float(np.abs(wanted).max()))
        self.total += float(errors.sum())
        self.count += wanted.size

    def agree(self, same: HostArray) -> None:
        """Count choices that are the same on both sides, bool."""
        self.agreeing += int(same.sum())
        self.ranked += same.size

    def row(self, tolerance: float, agreement: float = 0.0) -> ParityRow:
        """The verdict; `agreement` is the least fraction of agreeing rows."""
        share = self.agreeing / self.ranked if self.ranked else None
        return ParityRow(
            name=self.name,
            max_abs_error=self.largest,
            max_rel_error=self.largest / self.magnitude if self.magnitude else self.largest,
            mean_abs_error=self.total / self.count if self.count else 0.0,
            top1_agreement=share,
            tolerance=tolerance,
            passed=self.largest <= tolerance * max(1.0, self.magnitude) and (share is None or share >= agreement),
            worst=self.worst,
        )
