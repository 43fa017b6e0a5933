"""An evaluation's report as one HTML page that needs nothing else: figures are inline."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from dspark_edge.runtime.reporting.html_page import figure_style, look, new_axes, render_page, require_matplotlib
from dspark_edge.runtime.reporting.text_table import number, share
from dspark_edge.trainer.evaluation.measures import ConfidenceMeasures
from dspark_edge.trainer.evaluation.report import EvaluationReport
from dspark_edge.trainer.evaluation.tables import tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["render_html"]

_FEWEST_ROUNDS = 20  # of a point in the figure of depths; fewer are chance


def render_html(report: EvaluationReport) -> str:
    """The page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    bundle, settings = report.bundle, report.settings
    title = f"{bundle['target']} with {bundle['drafter']}"
    facts = (
        f"{settings['prompts']} prompts, temperature {settings['temperature']:g}, {settings['max_new_tokens']} new "
        f"tokens, {settings['verify_length']} of {bundle['block_size']} drafts verified; {bundle['precision']}, "
        f"lowering {bundle['lowering']}, {settings.get('engine', '')}, {report.machine['processor'] or 'processor?'}"
    )
    overall = (
        f"Accepted length τ {number(report.overall.accepted_length)}, {share(report.overall.acceptance_rate)} of the "
        f"drafts accepted, {number(report.overall.speedup)} × the speed of plain decoding. {_lossless(report)}"
    )
    return render_page(title, facts, overall, report.warnings, _figures(report), tables(report), _settings(report))


def _lossless(report: EvaluationReport) -> str:
    if report.lossless is None:
        return ""
    return "Every answer is the one of plain decoding." if report.lossless else "Some answers are not those of plain."


def _settings(report: EvaluationReport) -> str:
    data = report.to_json()
    names = ("bundle", "settings", "versions", "machine", "calibration", "differences")
    return json.dumps({name: data[name] for name in names}, indent=2, ensure_ascii=False)


def _figures(report: EvaluationReport) -> list[tuple[str, Figure]]:
    with figure_style():
        figures = [
            ("Acceptance by position", _positions(report, "acceptance_by_position", "accepted")),
            (
                "Conditional acceptance by position",
                _positions(report, "conditional_acceptance_by_position", "accepted, given those before"),
            ),
        ]
        if report.overall.raw is not None:
            figures.append(("Reliability diagram", _reliability(report.overall.raw, report.overall.calibrated)))
        if report.overall.acceptance_by_depth:
            figures.append(("Accepted length by depth in the context", _depths(report)))
        return figures


def _positions(report: EvaluationReport, name: str, label: str) -> Figure:
    figure, axes = new_axes(f"Drafts {label}", "position in the draft", "share")
    for index, (domain, measures) in enumerate(report.domains.items()):
        row = getattr(measures, name)
        known = [(position, value) for position, value in enumerate(row, start=1) if value is not None]
        axes.plot([one[0] for one in known], [one[1] for one in known], label=domain, **look(index))
    axes.set_ylim(0, 1.02)
    axes.set_xticks(range(1, int(report.bundle["block_size"]) + 1))
    axes.legend(frameon=False)
    return figure


def _reliability(raw: ConfidenceMeasures, calibrated: ConfidenceMeasures | None) -> Figure:
    figure, axes = new_axes("Reliability of the confidences, all positions", "confidence", "accepted")
    axes.plot([0, 1], [0, 1], linestyle="--", color="#888888", linewidth=1)
    for index, (name, measures) in enumerate((("raw", raw), ("calibrated", calibrated))):
        if measures is not None:
            points = [(one.confidence, one.outcome) for one in measures.reliability]
            label = f"{name}, ECE {share(measures.ece)}"
            axes.plot([one[0] for one in points], [one[1] for one in points], label=label, **look(index))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    return figure


def _depths(report: EvaluationReport) -> Figure:
    figure, axes = new_axes("Accepted length by depth in the context", "position of the anchor, from", "τ")
    begins = [depth.begin for depth in report.overall.acceptance_by_depth]
    for index, (domain, measures) in enumerate(report.domains.items()):
        depths = [depth for depth in measures.acceptance_by_depth if depth.rounds >= _FEWEST_ROUNDS]
        values = {depth.begin: depth.accepted_length for depth in depths}
        places = [place for place, begin in enumerate(begins) if begin in values]
        axes.plot(places, [values[begins[place]] for place in places], label=domain, **look(index))
    axes.set_xticks(range(len(begins)), [str(begin) for begin in begins])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure
