"""An evaluation's report as one HTML page that needs nothing else: figures are inline."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING, Any

from dspark_edge.engines.errors import MissingDependencyError
from dspark_edge.trainer.evaluation.measures import ConfidenceMeasures
from dspark_edge.trainer.evaluation.report import EvaluationReport
from dspark_edge.trainer.evaluation.tables import TextTable, number, share, tables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["render_html", "require_matplotlib"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind readers
_MARKERS = "osD^vP"
_FEWEST_ROUNDS = 20  # of a point in the figure of depths; fewer are chance
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } .facts { color: #555; } .warning { background: #fff3cd; padding: 0.5rem 0.8rem; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; } .figures img { width: 30rem; max-width: 100%; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; }
"""


def require_matplotlib() -> None:
    """Raise before an evaluation, not behind it, where its figures cannot be drawn.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "an HTML report", "train") from error


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
        f"lowering {bundle['lowering']}, {settings.get('provider', '')}, {report.machine['processor'] or 'processor?'}"
    )
    overall = (
        f"Accepted length τ {number(report.overall.accepted_length)}, {share(report.overall.acceptance_rate)} of the "
        f"drafts accepted, {number(report.overall.speedup)} × the speed of plain decoding. {_lossless(report)}"
    )
    warnings = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in report.warnings)
    figures = "".join(_image(figure, alt) for alt, figure in _figures(report))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="facts">{escape(facts)}</p>\n<p>{escape(overall)}</p>\n{warnings}\n'
        f'<div class="figures">{figures}</div>\n{"".join(map(_table, tables(report)))}\n'
        f"<h2>Settings</h2>\n<pre>{escape(_settings(report))}</pre>\n</body></html>\n"
    )


def _lossless(report: EvaluationReport) -> str:
    if report.lossless is None:
        return ""
    return "Every answer is the one of plain decoding." if report.lossless else "Some answers are not those of plain."


def _settings(report: EvaluationReport) -> str:
    data = report.to_json()
    names = ("bundle", "settings", "versions", "machine", "calibration", "differences")
    return json.dumps({name: data[name] for name in names}, indent=2, ensure_ascii=False)


def _table(table: TextTable) -> str:
    def row(cells: Iterable[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"

    body = "".join(row(cells, "td") for cells in table.rows)
    return (
        f'<h2>{escape(table.title)}</h2>\n<div class="wide"><table><thead>{row(table.header, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>\n"
    )


def _image(figure: Figure, alt: str) -> str:
    """A figure as an inline image: its own document, so that the ids of several do not meet."""
    from matplotlib import rc_context

    content = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    encoded = base64.b64encode(content.getvalue().encode()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{encoded}">\n'


def _figures(report: EvaluationReport) -> list[tuple[str, Figure]]:
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False, "font.family": "sans-serif"}):  # a domain may be called "$x"
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


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(5.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _look(index: int) -> dict[str, Any]:
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)], "markersize": 5}


def _positions(report: EvaluationReport, name: str, label: str) -> Figure:
    figure, axes = _axes(f"Drafts {label}", "position in the draft", "share")
    for index, (domain, measures) in enumerate(report.domains.items()):
        row = getattr(measures, name)
        known = [(position, value) for position, value in enumerate(row, start=1) if value is not None]
        axes.plot([one[0] for one in known], [one[1] for one in known], label=domain, **_look(index))
    axes.set_ylim(0, 1.02)
    axes.set_xticks(range(1, int(report.bundle["block_size"]) + 1))
    axes.legend(frameon=False)
    return figure


def _reliability(raw: ConfidenceMeasures, calibrated: ConfidenceMeasures | None) -> Figure:
    figure, axes = _axes("Reliability of the confidences, all positions", "confidence", "accepted")
    axes.plot([0, 1], [0, 1], linestyle="--", color="#888888", linewidth=1)
    for index, (name, measures) in enumerate((("raw", raw), ("calibrated", calibrated))):
        if measures is not None:
            points = [(one.confidence, one.outcome) for one in measures.reliability]
            label = f"{name}, ECE {share(measures.ece)}"
            axes.plot([one[0] for one in points], [one[1] for one in points], label=label, **_look(index))
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    return figure


def _depths(report: EvaluationReport) -> Figure:
    figure, axes = _axes("Accepted length by depth in the context", "position of the anchor, from", "τ")
    begins = [depth.begin for depth in report.overall.acceptance_by_depth]
    for index, (domain, measures) in enumerate(report.domains.items()):
        depths = [depth for depth in measures.acceptance_by_depth if depth.rounds >= _FEWEST_ROUNDS]
        values = {depth.begin: depth.accepted_length for depth in depths}
        places = [place for place, begin in enumerate(begins) if begin in values]
        axes.plot(places, [values[begins[place]] for place in places], label=domain, **_look(index))
    axes.set_xticks(range(len(begins)), [str(begin) for begin in begins])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure
