"""A bench's report: JSON, tables, and a page with a figure for each concurrency."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from dspark_edge.runtime.bench.cells import Cell, worst_first
from dspark_edge.runtime.bench.settings import BenchOptions
from dspark_edge.runtime.reporting.circumstances import machine_facts, versions_of
from dspark_edge.runtime.reporting.html_page import figure_style, new_axes, render_page, require_matplotlib
from dspark_edge.runtime.reporting.text_table import TextTable, number, share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["BenchReport", "make_report", "render_html", "tables"]

SCHEMA_VERSION = 1
_PACKAGES = ("dspark-edge", "onnxruntime", "onnxruntime-gpu", "numpy")
_UNEVEN = 0.1  # spread of a repeat's speeds from which a cell is worth a warning
_COLOURS = {"plain": "#888888", "static": "#d55e00", "scheduled": "#0072b2"}


@dataclass(frozen=True, slots=True)
class BenchReport:
    """What `dspark-edge bench` says."""

    measured_at: str  # UTC, ISO 8601
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    cells: tuple[Cell, ...]  # worst first
    interrupted: bool = False  # cells are missing
    notes: tuple[str, ...] = field(default=())

    @property
    def different(self) -> tuple[Cell, ...]:
        """Cells whose greedy answers are not all plain decoding's."""
        return tuple(cell for cell in self.cells if cell.same_answers is not None and cell.same_answers < 1)

    @property
    def slower(self) -> tuple[Cell, ...]:
        """Scheduled cells that are slower than plain decoding by more than noise, twice the standard error."""
        return tuple(
            cell
            for cell in self.cells
            if cell.mode == "scheduled"
            and cell.speedup is not None
            and cell.speedup_error is not None
            and cell.speedup + 2 * cell.speedup_error < 1
        )

    @property
    def lossless(self) -> bool | None:
        """Whether all greedy answers in fp32 are plain decoding's; None where none was compared.

        At lower precisions a call's width changes results by more than ties are apart: see bit-exact mode.
        """
        compared = [cell for cell in self.cells if cell.same_answers is not None and cell.precision == "fp32"]
        return all(cell.same_answers == 1 for cell in compared) if compared else None

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before believing the numbers."""
        found = list(self.notes)
        if self.interrupted:
            found.append("the bench was interrupted: cells are missing")
        for cell in self.different:
            found.append(
                f"{_name(cell)}: {share(1 - (cell.same_answers or 0))} of the answers are not plain decoding's"
            )
        for cell in self.slower:
            found.append(f"{_name(cell)}: slower than plain decoding, {_speedup(cell)} of it")
        uneven = [cell for cell in self.cells if cell.spread > _UNEVEN]
        if len(uneven) * 2 > len(self.cells):
            found.append(
                f"most cells' repeats differ by more than {share(_UNEVEN, 0)}; close what else uses the machine"
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """The report's JSON, as docs/bench.md describes it."""
        return {
            "schema_version": SCHEMA_VERSION,
            "measured_at": self.measured_at,
            "settings": dict(self.settings),
            "versions": dict(self.versions),
            "machine": dict(self.machine),
            "cells": [asdict(cell) for cell in self.cells],
            "lossless": self.lossless,
            "interrupted": self.interrupted,
            "warnings": self.warnings,
        }


def make_report(
    cells: Sequence[Cell],
    options: BenchOptions,
    engine: Mapping[str, Any],
    interrupted: bool = False,
    notes: Sequence[str] = (),
) -> BenchReport:
    """Order the cells, and say where and how they were measured.

    Args:
        cells: in any order.
        options: how they were measured.
        engine: more settings to name, such as the engine.
        interrupted: whether cells are missing.
        notes: warnings of whoever measured.
    """
    settings = {**asdict(options), "modes": [str(mode) for mode in options.modes], **engine}
    return BenchReport(
        measured_at=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        settings=settings,
        versions=versions_of(_PACKAGES),
        machine=machine_facts(),
        cells=tuple(worst_first(cells)),
        interrupted=interrupted,
        notes=tuple(notes),
    )


def tables(report: BenchReport) -> list[TextTable]:
    """All cells, the worst first."""
    header = (
        "mode",
        "precision",
        "domain",
        "T",
        "at once",
        "tokens/s",
        "spread",
        "× plain",
        "× best other",
        "τ",
        "parked",
        "predicted",
        "same",
    )
    return [TextTable("Worst first", header, tuple(_row(cell) for cell in report.cells))]


def render_html(report: BenchReport) -> str:
    """The page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    settings = report.settings
    facts = (
        f"{settings['max_new_tokens']} new tokens, {settings['repeats']} repeats that take turns, "
        f"{settings.get('threads')} threads, {settings.get('engine', '')}; {report.machine['processor'] or '?'}"
    )
    data = report.to_json()
    names = ("settings", "versions", "machine", "measured_at")
    return render_page(
        "What each mode brings here",
        facts,
        _summary(report),
        report.warnings,
        _figures(report),
        tables(report),
        json.dumps({name: data[name] for name in names}, indent=2, ensure_ascii=False),
    )


def _summary(report: BenchReport) -> str:
    scheduled = [cell for cell in report.cells if cell.mode == "scheduled" and cell.of_best is not None]
    if not scheduled:
        return "No mode was compared with another one."
    worst, best = scheduled[0], max(scheduled, key=lambda cell: cell.speedup or 0.0)
    return (
        f"Scheduled decoding is at worst {number(worst.of_best)} × the best other mode ({_name(worst)}), and at best "
        f"{number(best.speedup)} × plain decoding ({_name(best)})."
    )


def _name(cell: Cell) -> str:
    return (
        f"{cell.mode}, {cell.precision}, {cell.domain}, temperature {cell.temperature:g}, {cell.concurrency} at a time"
    )


def _speedup(cell: Cell) -> str:
    return number(cell.speedup) + ("" if cell.speedup_error is None else f" ± {number(cell.speedup_error)}")


def _row(cell: Cell) -> tuple[str, ...]:
    return (
        cell.mode,
        cell.precision,
        cell.domain,
        f"{cell.temperature:g}",
        str(cell.concurrency),
        number(cell.tokens_per_second, 1),
        share(cell.spread, 0),
        _speedup(cell),
        number(cell.of_best),
        number(cell.accepted_length),
        share(cell.parked_share, 0),
        "–" if cell.prediction_error is None else f"± {share(cell.prediction_error, 0)}",
        share(cell.same_answers, 0),
    )


def _figures(report: BenchReport) -> list[tuple[str, Figure]]:
    """Tokens/s by domain, a figure for each bundle, temperature and concurrency."""
    found = []
    with figure_style():
        places = dict.fromkeys(
            (cell.bundle, cell.precision, cell.temperature, cell.concurrency) for cell in report.cells
        )
        for bundle, precision, temperature, concurrency in sorted(places):
            title = f"{precision}, temperature {temperature:g}, {concurrency} at a time"
            of_place = [
                cell
                for cell in report.cells
                if (cell.bundle, cell.temperature, cell.concurrency) == (bundle, temperature, concurrency)
            ]
            found.append((title, _bars(title, of_place, report.settings["modes"])))
    return found


def _bars(title: str, cells: Sequence[Cell], modes: Sequence[str]) -> Figure:
    figure, axes = new_axes(title, "", "tokens/s of all requests")
    domains = sorted({cell.domain for cell in cells})
    width = 0.8 / len(modes)
    for index, mode in enumerate(modes):
        of_mode = {cell.domain: cell for cell in cells if cell.mode == mode}
        known = [(place, of_mode[domain]) for place, domain in enumerate(domains) if domain in of_mode]
        axes.bar(
            [place + (index - (len(modes) - 1) / 2) * width for place, _ in known],
            [cell.tokens_per_second for _, cell in known],
            width,
            yerr=[cell.tokens_per_second * cell.spread / 2 for _, cell in known],
            label=mode,
            color=_COLOURS.get(mode),
        )
    axes.set_xticks(range(len(domains)), domains)
    axes.legend(frameon=False)
    return figure
