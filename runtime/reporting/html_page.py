"""A report as one HTML page that needs nothing else: figures are inline."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_edge.engines.errors import InvalidInputError, MissingDependencyError
from dspark_edge.engines.replace_file import write_problem
from dspark_edge.runtime.reporting.text_table import TextTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "check_file_path",
    "check_page_path",
    "figure_style",
    "look",
    "new_axes",
    "render_page",
    "require_matplotlib",
    "write_page",
]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind readers
_MARKERS = "osD^vP"
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


def require_matplotlib(purpose: str = "an HTML report") -> None:
    """Raise before a long run, not behind it, where its figures cannot be drawn.

    Args:
        purpose: what it draws.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("matplotlib", purpose, "train") from error


def check_page_path(path: Path) -> None:
    """Refuse a report's path before a measurement, not behind it.

    Raises:
        InvalidInputError: nothing can be written there.
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib()
    check_file_path(path)


def check_file_path(path: Path) -> None:
    """Refuse a file's path before a measurement, not behind it.

    Raises:
        InvalidInputError: nothing can be written there.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InvalidInputError(f"cannot write {path}: it is a folder, or its folder is missing; give a file's name")


def write_page(path: Path, page: str) -> None:
    """Write a page.

    Raises:
        InvalidInputError: it cannot be written.
    """
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(write_problem(path, error)) from error


def render_page(
    title: str,
    facts: str,
    summary: str,
    warnings: Sequence[str],
    figures: Sequence[tuple[str, Figure]],
    tables: Sequence[TextTable],
    settings: str,
) -> str:
    """The page.

    Args:
        title: its heading.
        facts: a line in grey: of what, and on what.
        summary: a paragraph.
        warnings: what a reader must know before believing the numbers.
        figures: (what it shows, the figure).
        tables: below them.
        settings: how to measure the same again, as it is.
    """
    shown = "".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings)
    images = "".join(_image(figure, alt) for alt, figure in figures)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{escape(title)}</h1>\n"
        f'<p class="facts">{escape(facts)}</p>\n<p>{escape(summary)}</p>\n{shown}\n'
        f'<div class="figures">{images}</div>\n{"".join(map(_table, tables))}\n'
        f"<h2>Settings</h2>\n<pre>{escape(settings)}</pre>\n</body></html>\n"
    )


@contextmanager
def figure_style() -> Iterator[None]:
    """In which figures are made: a name is taken as it is, so that a domain may be called "$x"."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False, "font.family": "sans-serif"}):
        yield


def new_axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty figure in the pages' style."""
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(5.6, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def look(index: int) -> dict[str, Any]:
    """How the line of this number is drawn."""
    return {"color": _COLOURS[index % len(_COLOURS)], "marker": _MARKERS[index % len(_MARKERS)], "markersize": 5}


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
