"""dspark-edge plan: what fits on a device."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.exporter.options import PRECISIONS
from dspark_edge.exporter.pair import NGRAM
from dspark_edge.exporter.planning import DEVICES, DevicePlan, DeviceSpec, plan_device, read_pair_shape

__all__ = ["plan"]


@click.command(no_args_is_help=True)
@click.argument("target")
@click.argument("drafter", default=NGRAM)
@click.option("--device", "devices", multiple=True, help=f"{', '.join(DEVICES)}. May be repeated.  [default: all]")
@click.option("--precision", type=click.Choice(tuple(PRECISIONS)), default="fp16", show_default=True)
@click.option("--tau", type=float, help="Tokens that a round commits, to estimate decoding with the drafter.")
@click.option("--memory", type=float, help="GiB of another device; with --bandwidth.")
@click.option("--bandwidth", type=float, help="GB/s of another device; with --memory.")
@click.option("--unified", is_flag=True, help="Its memory is the system's, too.")
@click.option("--json", "as_json", is_flag=True, help="The plans as JSON.")
def plan(
    target: str,
    drafter: str,
    devices: tuple[str, ...],
    precision: str,
    tau: float | None,
    memory: float | None,
    bandwidth: float | None,
    unified: bool,
    as_json: bool,
) -> None:
    """Say what of TARGET with DRAFTER fits on a device, and how fast it may be; exit code 1 if nothing fits.

    Both are folders, config.json or .gguf files, or Hugging Face names; DRAFTER may be 'ngram'.
    """
    other = _other(memory, bandwidth, unified)
    if tau is not None and drafter == NGRAM:
        raise InvalidInputError("tau is of a trained drafter; give its configuration, too")
    pair = read_pair_shape(target, None if drafter == NGRAM else drafter)
    names = devices or (() if other else tuple(DEVICES))
    plans = [plan_device(pair, name, precision, tau=tau) for name in names]
    if other is not None:
        plans.append(plan_device(pair, "this one", precision, other, tau))
    if as_json:
        click.echo(json.dumps([one.to_json() for one in plans], indent=2))
    else:
        _show(plans, Path(target).name or target)
    if not any(one.fits for one in plans):
        sys.exit(1)


def _other(memory: float | None, bandwidth: float | None, unified: bool) -> DeviceSpec | None:
    if memory is None and bandwidth is None:
        return None
    if memory is None or bandwidth is None or memory <= 0 or bandwidth <= 0:
        raise InvalidInputError("another device needs both --memory (GiB) and --bandwidth (GB/s), above 0")
    return DeviceSpec(int(memory * (1 << 30)), bandwidth * 1e9, unified, "as given")


def _show(plans: list[DevicePlan], name: str) -> None:
    first = plans[0]
    speculative = first.speculative_tokens_per_second is not None
    title = f"{name}, {first.precision}: {first.footprint.weights / 1e9:.2f} GB of weights; tokens of context by batch"
    table = Table(title=title, title_justify="left")
    table.add_column("device", no_wrap=True)
    for batch in first.longest:
        table.add_column(str(batch), justify="right")
    table.add_column("plain, tokens/s", justify="right")
    if speculative:
        table.add_column("drafting", justify="right")
    for one in plans:
        cells = [str(tokens) if tokens else "–" for tokens in one.longest.values()]
        speeds = [f"≤ {one.plain_tokens_per_second:.0f}" if one.fits else "–"]
        if speculative:
            speeds.append(f"≤ {one.speculative_tokens_per_second:.0f}" if one.fits else "–")
        table.add_row(one.device, *cells, *speeds)
    Console().print(table)
