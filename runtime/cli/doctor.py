"""dspark-edge doctor."""

from __future__ import annotations

import click

__all__ = ["doctor"]


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The report as JSON.")
def doctor(as_json: bool) -> None:
    """Say what this machine has, what it can do, and the command that installs what is missing."""
    from dspark_edge.engines.machine import probe_machine
    from dspark_edge.runtime.doctor import diagnose, render

    report = diagnose(probe_machine())
    if as_json:
        click.echo(report.to_json())
        return
    from rich.console import Console

    render(report, Console())
