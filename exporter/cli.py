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
from dspark_edge.engines.opening import ENGINES, EngineChoice
from dspark_edge.exporter.export import PRECISIONS, ExportOptions, export_bundle
from dspark_edge.exporter.lowerings import LOWERINGS
from dspark_edge.exporter.parity import compare_bundle, render
from dspark_edge.exporter.parity_report import render_text
from dspark_edge.exporter.text_parity import compare_on_text, tokenize_file

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
@click.option(
    "--weight-block-size",
    type=int,
    help="int8, int4, w4a16: weights that share a scale.  [default: 32 in int4, else 64, or what fits]",
)
@click.option(
    "--accuracy-level",
    type=int,
    help="int8, int4: 4 rounds activations to int8, 1 keeps them in fp32.  [default: 4]",
)
@click.option("--vocabulary-bits", type=int, help="int4: bits of embedding and head, 4 or 8.  [default: 8]")
@click.option(
    "--keep-blocks/--round-blocks",
    default=True,
    show_default=True,
    help="int8, int4: take a GGUF file's own blocks as they are, where they fit, or round them again.",
)
@click.option(
    "--packed-sequences",
    type=int,
    help="ort: sequences that share a call when batches are verified, 0 for none.  [default: fp32 4, else 0]",
)
@click.option(
    "--short-block",
    type=int,
    help="ort: tokens of a short draft, where a whole block does not pay, 0 for none.  [default: half a block of 6 up]",
)
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
@click.option("--text", type=click.Path(path_type=Path), help="A text file: compare perplexities on it, too.")
@click.option("--text-tokens", type=int, default=4096, show_default=True, help="Most tokens of it that are read.")
@click.option(
    "--engine", type=click.Choice(ENGINES), default="onnxruntime", show_default=True, help="What runs the graphs."
)
@click.option("--provider", help="Of ONNX Runtime: cpu, cuda, or a provider's full name.  [default: cpu]")
@click.option("--layers", is_flag=True, help="A row for the keys and values of each layer: shows where it goes wrong.")
@click.option("--json", "as_json", is_flag=True, help="The table as JSON.")
def parity(
    bundle: Path,
    target: str,
    drafter: str,
    text: Path | None,
    text_tokens: int,
    engine: str,
    provider: str | None,
    layers: bool,
    as_json: bool,
) -> None:
    """Compare BUNDLE with its checkpoints in torch; exit code 1 if an output is over its tolerance."""
    choice, opened = EngineChoice(engine, provider), Bundle.open(bundle)
    token_ids = None if text is None else tokenize_file(opened, text, text_tokens)
    with _progress() as report:
        result = compare_bundle(opened, target, drafter, engine_factory=choice.open, layers=layers, report=report)
        read = (
            None
            if token_ids is None
            else compare_on_text(opened, target, drafter, token_ids, engine_factory=choice.open, report=report)
        )
    if as_json:
        about_text = {} if read is None else {"text": read.to_json()}
        click.echo(json.dumps({**result.to_json(), **about_text}, indent=2))
    else:
        render(result, Console())
        if read is not None:
            render_text(read, Console())
    if not result.passed or (read is not None and not read.passed):
        sys.exit(1)
