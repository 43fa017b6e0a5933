"""Tables of text: what the terminal shows, and a page repeats."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["TextTable", "number", "print_table", "share", "table_console"]


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table; the first column names the row, the others hold numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def number(value: float | None, digits: int = 2) -> str:
    """A number, or a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def share(value: float | None, digits: int = 1) -> str:
    """A share in per cent, or a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def table_console() -> Console:
    """Where tables go; in a file they need not fit a screen."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def print_table(table: TextTable, console: Console) -> None:
    """Print a table with its title above it."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    shown = Table(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(table.header):
        shown.add_column(name, justify="left" if index == 0 else "right")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown)
