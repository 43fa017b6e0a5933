"""dspark-edge bench."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.opening import EngineChoice
from dspark_edge.engines.profile_device import Device
from dspark_edge.runtime.bench.bench import RANDOM_DOMAIN, Bench, prompts_by_domain, random_prompts
from dspark_edge.runtime.bench.report import BenchReport, make_report, render_html, tables
from dspark_edge.runtime.bench.settings import BenchOptions, parse_mode
from dspark_edge.runtime.cli.options import backend_options, counting, engine_choice, numbers, whole_numbers
from dspark_edge.runtime.encoding import Prompt
from dspark_edge.runtime.prompts import read_prompt_records
from dspark_edge.runtime.reporting.html_page import check_page_path, write_page
from dspark_edge.runtime.reporting.text_table import print_table, table_console
from dspark_edge.runtime.scheduled_policy import profiled_costs
from dspark_edge.runtime.scheduling import Costs

__all__ = ["bench"]


def _costs(bundle: Bundle, device: Device, options: BenchOptions) -> Mapping[str, Costs] | None:
    if all(mode.name != "scheduled" for mode in options.modes):
        return None
    return profiled_costs(bundle, device, needed=True)


def _measure(
    bench: Bench,
    bundles: Sequence[Path],
    prompts: Mapping[str, Sequence[Prompt]],
    random: int,
    choice: EngineChoice,
    device: Device,
) -> None:
    """Measure bundle after bundle."""
    bench.plan(len(bundles), [*map(len, prompts.values()), *([random] if random else [])])
    for path in bundles:
        with choice.open(Bundle.open(path)) as engine:
            asked = dict(prompts)
            if random:
                asked[RANDOM_DOMAIN] = [*random_prompts(engine.bundle.manifest, random, bench.options.seed)]
            bench.measure(path.name, engine, asked, _costs(engine.bundle, device, bench.options))


def _show(report: BenchReport, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=2, ensure_ascii=False))
    else:
        console = table_console()
        for table in tables(report):
            print_table(table, console)
    for warning in report.warnings:
        click.echo(f"Warning: {warning}", err=True)


@click.command(no_args_is_help=True)
@click.argument("bundles", metavar="BUNDLE...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--prompts", type=click.Path(path_type=Path), metavar="FILE.jsonl", help="One prompt a line.")
@click.option(
    "--random", type=click.IntRange(min=0), default=0, show_default=True, help="So many prompts of random tokens, too."
)
@click.option(
    "--modes",
    default="plain,static,scheduled",
    show_default=True,
    help="What is compared; static:3 verifies 3 draft tokens every round.",
)
@click.option(
    "--concurrency", "concurrencies", default="1", show_default=True, callback=whole_numbers, help="Requests at once."
)
@click.option("--temperatures", default="0", show_default=True, callback=numbers, help="0 is greedy.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True, help="Of an answer.")
@click.option("--repeats", type=int, default=3, show_default=True, help="Runs of each; medians are of these.")
@click.option("--limit", type=click.IntRange(min=1), help="Take only the first prompts of each domain.")
@click.option("--seed", type=int, default=0, show_default=True, help="Equal seeds ask for equal draws.")
@backend_options
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE.html", help="Write the report as a page.")
def bench(
    bundles: tuple[Path, ...],
    prompts: Path | None,
    random: int,
    modes: str,
    limit: int | None,
    as_json: bool,
    html: Path | None,
    **given: Any,
) -> None:
    """Measure what each mode brings on this device: all of them in turns, on the same prompts, the worst first.

    Several bundles, such as one of each precision, are measured one after the other. Interrupted (Ctrl-C), it reports
    what it has. Exit code 1 if a greedy answer in fp32 is not the one of plain decoding.
    """
    choice = engine_choice(given)
    options = BenchOptions(modes=tuple(parse_mode(mode) for mode in modes.split(",") if mode.strip()), **given)
    if prompts is None and not random:
        raise InvalidInputError("there is nothing to answer: give --prompts FILE.jsonl, or --random 8, or both")
    domains = prompts_by_domain(read_prompt_records(prompts), limit) if prompts is not None else {}
    if html is not None:
        check_page_path(html)
    interrupted = False
    device = choice.device()
    facts: dict[str, Any] = {"engine": choice.name, "bundles": [str(path) for path in bundles]}
    facts["threads"] = device.threads
    facts["prompts"] = {domain: len(of_domain) for domain, of_domain in domains.items()}
    facts["prompts_file"] = prompts.name if prompts is not None else None
    with counting("answers") as progress:
        measured = Bench(options, progress)
        try:
            _measure(measured, bundles, domains, random, choice, device)
        except KeyboardInterrupt:
            if not measured.cells:
                raise
            interrupted = True
    report = make_report(measured.cells, options, facts, interrupted)
    if html is not None:
        write_page(html, render_html(report))
    _show(report, as_json)
    if interrupted:
        sys.exit(130)
    if report.lossless is False:
        sys.exit(1)
