"""dspark-edge evaluate and dspark-edge calibrate."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.engines.replace_file import write_problem
from dspark_edge.runtime.calibration import Calibration, Fit
from dspark_edge.runtime.cli.options import bundle_argument
from dspark_edge.runtime.prompts import PromptRecord, read_prompt_records
from dspark_edge.trainer.evaluation.calibration import CalibrationOptions, calibrate, check_calibratable
from dspark_edge.trainer.evaluation.evaluate import EvaluationOptions, evaluate
from dspark_edge.trainer.evaluation.html import render_html, require_matplotlib
from dspark_edge.trainer.evaluation.report import EvaluationReport, make_report
from dspark_edge.trainer.evaluation.tables import TextTable, number, share, tables

__all__ = ["calibrate_command", "evaluate_command"]

_ENOUGH_SAMPLES = 500  # of a position, for its figures to mean something
_SHOWN_DIFFERENCES = 5

_prompts_option = click.option(
    "--prompts", required=True, type=click.Path(path_type=Path), metavar="FILE.jsonl", help="One prompt a line."
)
_limit_option = click.option("--limit", type=click.IntRange(min=1), help="Take only the first prompts.")
_tokens_option = click.option("--max-new-tokens", type=int, default=128, show_default=True, help="Of an answer.")
_seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Equal seeds give equal answers.")
_provider_option = click.option("--provider", default="cpu", show_default=True, help="cpu, cuda, or a full name.")
_threads_option = click.option("--threads", type=int, help="Threads on the CPU.  [default: all cores]")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal's stderr."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _read_prompts(path: Path, limit: int | None) -> list[PromptRecord]:
    return read_prompt_records(path)[:limit]


def _console() -> Console:
    """Where tables go; in a file they need not fit a screen."""
    return Console(width=None if sys.stdout.isatty() else 120)


def _print(table: TextTable, console: Console) -> None:
    shown = Table(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(table.header):
        shown.add_column(name, justify="left" if index == 0 else "right")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown)


def _show_report(report: EvaluationReport, console: Console) -> None:
    for table in tables(report):
        _print(table, console)
    for difference in report.differences[:_SHOWN_DIFFERENCES] if report.lossless is False else ():
        console.print(
            f"line {difference.line}, turn {difference.turn} differs at token {difference.index}: plain "
            f"{difference.plain_token} (log-probability {number(difference.plain_log_prob, 4)}), static "
            f"{difference.static_token} ({number(difference.static_log_prob, 4)})",
            style="red",
        )
    if report.lossless:
        console.print(f"all {report.overall.turns} answers are those of plain decoding", style="green")


def _check_writable(path: Path) -> None:
    """Refuse a report's path before an evaluation, not behind it."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InvalidInputError(f"cannot write {path}: it is a folder, or its folder is missing; give a file's name")


def _write_html(path: Path, report: EvaluationReport) -> None:
    try:
        path.write_text(render_html(report), encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(write_problem(path, error)) from error


@click.command("evaluate", no_args_is_help=True)
@bundle_argument
@_prompts_option
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@_seed_option
@_tokens_option
@click.option("--verify-length", type=int, help="Draft tokens verified a round.  [default: the block]")
@_limit_option
@_provider_option
@_threads_option
@click.option("--no-plain", is_flag=True, help="Leave out plain decoding: no speed-up, no comparison of tokens.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE.html", help="Write the report as a page.")
def evaluate_command(
    bundle: Path,
    prompts: Path,
    limit: int | None,
    provider: str,
    threads: int | None,
    no_plain: bool,
    as_json: bool,
    html: Path | None,
    **given: Any,
) -> None:
    """Measure BUNDLE on prompts: accepted lengths, confidences and speed, against plain decoding.

    Exit code 1 if an answer at temperature 0 is not the one of plain decoding.
    """
    options = EvaluationOptions(plain=not no_plain, **given)
    records = _read_prompts(prompts, limit)
    if html is not None:
        require_matplotlib()
        _check_writable(html)
    with OnnxRuntimeEngine(Bundle.open(bundle), provider, threads) as engine, _progress("prompts") as progress:
        evaluation = evaluate(engine, records, options, progress)
        facts = {"prompts_file": prompts.name, "provider": provider, "threads": engine.threads}
        report = make_report(evaluation, engine.bundle, records, options, facts)
    if html is not None:
        _write_html(html, report)
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        _show_report(report, _console())
    for warning in report.warnings:
        click.echo(f"Warning: {warning}", err=True)
    if report.lossless is False:
        sys.exit(1)


def _fit_table(fit: Fit) -> TextTable:
    shares = zip(fit.ece_before, fit.ece_after, fit.survival_ece_before, fit.survival_ece_after, strict=True)
    scaling = fit.scaling
    scales = zip(scaling.temperatures, scaling.temperatures_below, scaling.biases, strict=True)
    rows = zip(fit.samples, shares, scales, strict=True)
    return TextTable(
        f"Sampled at temperature {fit.sampling_temperature:g}, measured on the prompts of the fit",
        ("position", "samples", "ECE", "after", "survival ECE", "after", "temperature", "below 0", "bias"),
        tuple(
            (str(position), str(samples), *map(share, errors), *map(number, scale))
            for position, (samples, errors, scale) in enumerate(rows, start=1)
        ),
    )


def _thin_positions(calibration: Calibration) -> Iterator[str]:
    for fit in calibration.fits:
        thin = [str(position) for position, count in enumerate(fit.samples, start=1) if count < _ENOUGH_SAMPLES]
        if thin:
            yield (
                f"at temperature {fit.sampling_temperature:g} the positions {', '.join(thin)} have fewer than "
                f"{_ENOUGH_SAMPLES} samples; more prompts would calibrate them better"
            )


@click.command("calibrate", no_args_is_help=True)
@bundle_argument
@_prompts_option
@click.option(
    "--temperature",
    "temperatures",
    type=float,
    multiple=True,
    default=(0.0, 1.0),
    show_default="0 and 1",
    help="Of sampling; a fit is made for each. Repeatable.",
)
@_seed_option
@_tokens_option
@_limit_option
@_provider_option
@_threads_option
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where to keep finished prompts, so that a killed run goes on.  [default: a hidden file in the bundle]",
)
@click.option("--json", "as_json", is_flag=True, help="The calibration as JSON on stdout.")
def calibrate_command(
    bundle: Path,
    prompts: Path,
    limit: int | None,
    provider: str,
    threads: int | None,
    work: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Fit BUNDLE's confidences to prompts, and write calibration.json into it.

    Take prompts that nothing is evaluated on. A run that was killed goes on where it stopped.
    """
    options = CalibrationOptions(**given)
    records = _read_prompts(prompts, limit)
    opened = Bundle.open(bundle)
    check_calibratable(opened)
    with OnnxRuntimeEngine(opened, provider, threads) as engine, _progress("answers") as progress:
        calibration = calibrate(engine, records, options, work=work, report=progress)
    if as_json:
        click.echo(json.dumps(calibration.to_json(), indent=2))
    else:
        console = _console()
        for fit in calibration.fits:
            _print(_fit_table(fit), console)
    for warning in _thin_positions(calibration):
        click.echo(f"Warning: {warning}", err=True)
