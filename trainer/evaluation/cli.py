"""dspark-edge evaluate and dspark-edge calibrate."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from dspark_edge.engines.bundle import Bundle
from dspark_edge.runtime.calibration import Calibration, Fit
from dspark_edge.runtime.cli.options import backend_options, bundle_argument, counting, engine_choice
from dspark_edge.runtime.prompts import PromptRecord, read_prompt_records
from dspark_edge.runtime.reporting.html_page import check_page_path, write_page
from dspark_edge.runtime.reporting.text_table import TextTable, number, print_table, share, table_console
from dspark_edge.trainer.evaluation.calibration import CalibrationOptions, calibrate, check_calibratable
from dspark_edge.trainer.evaluation.evaluate import EvaluationOptions, evaluate
from dspark_edge.trainer.evaluation.html import render_html
from dspark_edge.trainer.evaluation.report import EvaluationReport, make_report
from dspark_edge.trainer.evaluation.tables import tables

__all__ = ["calibrate_command", "evaluate_command"]

_ENOUGH_SAMPLES = 500  # of a position, for its figures to mean something
_SHOWN_DIFFERENCES = 5

_prompts_option = click.option(
    "--prompts", required=True, type=click.Path(path_type=Path), metavar="FILE.jsonl", help="One prompt a line."
)
_limit_option = click.option("--limit", type=click.IntRange(min=1), help="Take only the first prompts.")
_tokens_option = click.option("--max-new-tokens", type=int, default=128, show_default=True, help="Of an answer.")
_seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Equal seeds give equal answers.")


def _read_prompts(path: Path, limit: int | None) -> list[PromptRecord]:
    return read_prompt_records(path)[:limit]


def _show_report(report: EvaluationReport, console: Console) -> None:
    for table in tables(report):
        print_table(table, console)
    for difference in report.differences[:_SHOWN_DIFFERENCES] if report.lossless is False else ():
        console.print(
            f"line {difference.line}, turn {difference.turn} differs at token {difference.index}: plain "
            f"{difference.plain_token} (log-probability {number(difference.plain_log_prob, 4)}), static "
            f"{difference.static_token} ({number(difference.static_log_prob, 4)})",
            style="red",
        )
    if report.lossless:
        console.print(f"all {report.overall.turns} answers are those of plain decoding", style="green")


@click.command("evaluate", no_args_is_help=True)
@bundle_argument
@_prompts_option
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@_seed_option
@_tokens_option
@click.option("--verify-length", type=int, help="Draft tokens verified a round.  [default: the block]")
@_limit_option
@backend_options
@click.option("--no-plain", is_flag=True, help="Leave out plain decoding: no speed-up, no comparison of tokens.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE.html", help="Write the report as a page.")
def evaluate_command(
    bundle: Path,
    prompts: Path,
    limit: int | None,
    no_plain: bool,
    as_json: bool,
    html: Path | None,
    **given: Any,
) -> None:
    """Measure BUNDLE on prompts: accepted lengths, confidences and speed, against plain decoding.

    Exit code 1 if an answer at temperature 0 is not the one of plain decoding.
    """
    choice = engine_choice(given)
    options = EvaluationOptions(plain=not no_plain, **given)
    records = _read_prompts(prompts, limit)
    if html is not None:
        check_page_path(html)
    with choice.open(Bundle.open(bundle)) as engine, counting("prompts") as progress:
        evaluation = evaluate(engine, records, options, progress)
        facts = {"prompts_file": prompts.name, "engine": choice.name, "threads": choice.device().threads}
        report = make_report(evaluation, engine.bundle, records, options, facts)
    if html is not None:
        write_page(html, render_html(report))
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        _show_report(report, table_console())
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
@backend_options
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
    work: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Fit BUNDLE's confidences to prompts, and write calibration.json into it.

    Take prompts that nothing is evaluated on. A run that was killed goes on where it stopped.
    """
    choice = engine_choice(given)
    options = CalibrationOptions(**given)
    records = _read_prompts(prompts, limit)
    opened = Bundle.open(bundle)
    check_calibratable(opened)
    with choice.open(opened) as engine, counting("answers") as progress:
        calibration = calibrate(engine, records, options, work=work, report=progress)
    if as_json:
        click.echo(json.dumps(calibration.to_json(), indent=2))
    else:
        console = table_console()
        for fit in calibration.fits:
            print_table(_fit_table(fit), console)
    for warning in _thin_positions(calibration):
        click.echo(f"Warning: {warning}", err=True)
