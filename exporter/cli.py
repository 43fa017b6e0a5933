"""The commands that need torch: dspark-edge export and dspark-edge parity."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dspark_edge.engines.bundle import Bundle
from dspark_edge.exporter.export import PRECISIONS, ExportOptions, export_bundle
from dspark_edge.exporter.lowerings import LOWERINGS
from dspark_edge.exporter.parity import compare_bundle, render

__all__ = ["export", "parity"]

_target_option = click.option("--target", required=True, help="A folder, a .gguf file, or a Hugging Face name.")
_drafter_option = click.option("--drafter", required=True, help="A folder or Hugging Face name, or 'ngram'.")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on a terminal's stderr, one for each thing that is being done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    tasks: dict[str, TaskID] = {}
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield report


@click.command(no_args_is_help=True)
@_target_option
@_drafter_option
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle's folder.")
@click.option("--lowering", type=click.Choice(LOWERINGS), default="ort", show_default=True)
@click.option("--precision", type=click.Choice(tuple(PRECISIONS)), default="fp32", show_default=True)
@click.option(
    "--capacity", type=int, help="Cache slots, tokens.  [default: 4096 (ort) or 2048, or the target's context]"
)
@click.option("--max-batch", type=int, default=1, show_default=True, help="Sequences decoded together.")
@click.option(
    "--candidates", type=int, default=64, show_default=True, help="Tokens of a step that drafting samples from."
)
@click.option("--candidate-pool", type=int, help="Tokens of a position that the Markov bias may lift.  [default: all]")
@click.option("--ngram-block-size", type=int, default=7, show_default=True, help="Most tokens that 'ngram' drafts.")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="A folder or tokenizer.json to use instead.")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
def export(target: str, drafter: str, output: Path, tokenizer: Path | None, overwrite: bool, **options: Any) -> None:
    """Export a target and its drafter to a bundle."""
    wanted = ExportOptions(**options)
    with _progress() as report:
        bundle = export_bundle(target, drafter, output, wanted, tokenizer=tokenizer, overwrite=overwrite, report=report)
    size = sum(record.size for record in bundle.manifest.files)
    click.echo(f"{output}: {len(bundle.manifest.files)} files, {size / 1e6:.1f} MB", err=True)


@click.command(no_args_is_help=True)
@click.argument("bundle", type=click.Path(path_type=Path))
@_target_option
@_drafter_option
@click.option("--json", "as_json", is_flag=True, help="The table as JSON.")
def parity(bundle: Path, target: str, drafter: str, as_json: bool) -> None:
    """Compare BUNDLE with its checkpoints in torch; exit code 1 if an output is over its tolerance."""
    with _progress() as report:
        result = compare_bundle(Bundle.open(bundle), target, drafter, report=report)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        render(result, Console())
    if not result.passed:
        sys.exit(1)
