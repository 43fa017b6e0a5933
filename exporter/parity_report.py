"""What `parity` reports: errors of every output, collected over many calls, and their verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from dspark_edge.engines.engine import HostArray

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "LogitComparison",
    "LogitShift",
    "OutputErrors",
    "ParityReport",
    "ParityRow",
    "TextReport",
    "render",
    "render_text",
]


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
class LogitShift:
    """How far a bundle's predictions are from those of its checkpoint in fp32."""

    positions: int
    top1_agreement: float  # fraction of positions with the same best token
    divergence: float  # mean over positions of KL(checkpoint ‖ bundle), nats
    worst_margin: float  # the most by which the checkpoint prefers its own best token to the bundle's, nats
    least_agreement: float = 0.0  # 0: not judged

    @property
    def passed(self) -> bool:
        return self.top1_agreement >= self.least_agreement


@dataclass(frozen=True, slots=True)
class TextReport:
    """What `compare_on_text` found."""

    shift: LogitShift
    perplexity: float  # the bundle's
    reference_perplexity: float  # the checkpoint's, in fp32
    tolerance: float  # on what the first exceeds the second by, as a fraction of it

    @property
    def passed(self) -> bool:
        return self.perplexity <= self.reference_perplexity * (1 + self.tolerance)

    def to_json(self) -> dict[str, object]:
        """The report as JSON values; what is not finite is null."""
        return {
            **_finite(asdict(self.shift)),
            **_finite({"perplexity": self.perplexity, "reference_perplexity": self.reference_perplexity}),
            "tolerance": self.tolerance,
            "passed": self.passed,
        }


@dataclass(frozen=True, slots=True)
class ParityReport:
    """What `compare_bundle` found.

    Of a bundle with quantised weights, `rows` compare its graphs with torch on the same, rounded weights, and
    `quantization` says what the rounding itself changed.
    """

    bundle: str
    lowering: str
    precision: str
    positions: int  # tokens that were compared
    rows: tuple[ParityRow, ...]
    quantization: LogitShift | None = None

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows) and (self.quantization is None or self.quantization.passed)

    def to_json(self) -> dict[str, object]:
        """The report as JSON values; an error that is not finite is null."""
        quantization = None if self.quantization is None else _finite(asdict(self.quantization))
        return {
            "bundle": self.bundle,
            "lowering": self.lowering,
            "precision": self.precision,
            "positions": self.positions,
            "passed": self.passed,
            "rows": [_finite(asdict(row)) for row in self.rows],
            **({} if quantization is None else {"quantization": quantization}),
        }


def _finite(values: Mapping[str, object]) -> dict[str, object]:
    """The values, those that JSON has no number for as null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
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
        verdict = _verdict(row.passed)
        table.add_row(name, *(f"{error:.1e}" for error in errors), agreement, f"{row.tolerance:.0e}", verdict)
    console.print(table)
    if report.quantization is not None:
        shift = report.quantization
        verdict = f": {_verdict(shift.passed)}" if shift.least_agreement else ""
        console.print(f"quantized weights against fp32, {_in_words(shift)}{verdict}")


def render_text(report: TextReport, console: Console) -> None:
    """Print a report on a text."""
    own, wanted = report.perplexity, report.reference_perplexity
    change = f"{own / wanted - 1:+.2%}" if wanted else "no text"
    console.print(f"perplexity {own:.3f}, of the checkpoint in fp32 {wanted:.3f} ({change}): {_verdict(report.passed)}")
    console.print(f"text, {_in_words(report.shift)}")


def _in_words(shift: LogitShift) -> str:
    return (
        f"{shift.positions} positions: top-1 agreement {shift.top1_agreement:.2%}, KL {shift.divergence:.2e} nats, "
        f"worst margin {shift.worst_margin:.2f} nats"
    )


def _verdict(passed: bool) -> str:
    return "[green]ok[/green]" if passed else "[red]FAILED[/red]"


@dataclass(slots=True)
class LogitComparison:
    """Collects a `LogitShift` over calls."""

    positions: int = 0
    agreeing: int = 0
    divergence: float = 0.0
    worst_margin: float = 0.0

    def add(self, given: HostArray, expected: HostArray) -> None:
        """Compare logits [R, V] of the bundle with the checkpoint's."""
        ours, theirs = _log_softmax(given), _log_softmax(expected)
        own, wanted = given.argmax(-1), expected.argmax(-1)
        rows = np.arange(len(own))
        divergences = (np.exp(theirs) * (theirs - ours)).sum(-1)
        margins = theirs[rows, wanted] - theirs[rows, own]
        self.positions += len(own)
        self.agreeing += int((own == wanted).sum())
        self.divergence += float(np.where(np.isnan(divergences), np.inf, divergences).sum())
        self.worst_margin = max(self.worst_margin, float(margins.max(initial=0.0)))

    def result(self, least_agreement: float = 0.0) -> LogitShift:
        count = max(self.positions, 1)
        return LogitShift(
            self.positions, self.agreeing / count, self.divergence / count, self.worst_margin, least_agreement
        )


def _log_softmax(logits: HostArray) -> HostArray:
    wide = np.asarray(logits, np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    result: HostArray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


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
