"""dspark-edge build: TensorRT engines of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.tensorrt.builder import BuildNeeds, BuildOptions, build_engines, estimate_needs
from dspark_edge.engines.tensorrt.flavour import BACKENDS, load_flavour
from dspark_edge.engines.tensorrt.profiles import resolve_sizes
from dspark_edge.runtime.cli.options import bundle_argument, whole_numbers

__all__ = ["build"]


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal's stderr for each graph."""
    columns = (
        TextColumn("building {task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    tasks: dict[str, TaskID] = {}
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def report(role: str, share: float) -> None:
            if role not in tasks:
                tasks[role] = progress.add_task(role, total=1.0)
            progress.update(tasks[role], completed=share)

        yield report


@click.command(no_args_is_help=True)
@bundle_argument
@click.option("--backend", type=click.Choice(BACKENDS), required=True)
@click.option(
    "--widths",
    callback=whole_numbers,
    help="Tokens of target calls, such as 1,2,4,8.  [default: 1 to the block size + 1]",
)
@click.option("--max-batch", type=int, help="Sequences decoded together.  [default: as exported]")
@click.option("--prefill-chunk", type=int, help="Tokens of a prompt in a call.  [default: 512, or the capacity]")
@click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    help="Of the GPUs to build for, such as 8.6. May be repeated.  [default: the GPU here; tensorrt-rtx: all it can]",
)
@click.option("--timing-cache", type=click.Path(path_type=Path), help="Of earlier builds.  [default: with the engines]")
@click.option("--workspace", type=float, help="GiB that a layer may use for scratch.  [default: all]")
@click.option(
    "--share-weights/--no-share-weights",
    default=True,
    show_default=True,
    help="Bind what target and drafter share to both engines: embedding and head are on the device once.",
)
def build(
    bundle: Path,
    backend: str,
    widths: tuple[int, ...],
    max_batch: int | None,
    prefill_chunk: int | None,
    capabilities: tuple[str, ...],
    timing_cache: Path | None,
    workspace: float | None,
    share_weights: bool,
) -> None:
    """Build TensorRT engines of BUNDLE's graphs, into the bundle."""
    if workspace is not None and workspace <= 0:
        raise InvalidInputError(f"workspace is {workspace} GiB, expected more than 0")
    opened = Bundle.open(bundle)
    sizes = resolve_sizes(opened.manifest, widths, max_batch, prefill_chunk)
    flavour = load_flavour(backend)
    scratch = None if workspace is None else int(workspace * (1 << 30))
    options = BuildOptions(sizes, capabilities, timing_cache, scratch, share_weights)
    needs = estimate_needs(opened, sizes, compiles_late=flavour.compiles_late, share_weights=share_weights)
    click.echo(_needs(needs), err=True)
    with _progress() as report:
        folder = build_engines(opened, flavour, options, report)
    size = sum(file.stat().st_size for file in folder.glob("*.engine"))
    click.echo(f"{folder}: {len(opened.manifest.graphs)} engines, {size / 1e6:.1f} MB", err=True)


def _needs(needs: BuildNeeds) -> str:
    there = "" if needs.available is None else f" of the {needs.available / 1e9:.1f} GB that are free"
    return (
        f"building takes about {needs.host / 1e9:.1f} GB of memory{there}; the engines will take "
        f"{needs.weights / 1e9:.2f} GB on the device for weights, {needs.caches / 1e9:.2f} for caches and "
        f"{needs.logits / 1e9:.2f} for logits"
    )
