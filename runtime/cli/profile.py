"""dspark-edge profile."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import BundleError, InvalidInputError, MissingDependencyError
from dspark_edge.engines.opening import EngineChoice
from dspark_edge.engines.profile import SAMPLER_ROLES, Profile, check_writable, profile_name, stale_reasons
from dspark_edge.engines.profile_device import Device
from dspark_edge.engines.replace_file import replace_file
from dspark_edge.runtime.cli import waiting
from dspark_edge.runtime.cli.options import backend_options, bundle_argument, engine_choice, whole_numbers
from dspark_edge.runtime.profiling import plan_profile, profile_engine, usual_batches
from dspark_edge.runtime.reporting.html_page import check_file_path, require_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console

__all__ = ["profile", "render_picture", "show_profile"]

_BUDGET_S = 60.0
_UNEVEN = 0.25  # spread of most target costs from which a profile is worth a warning
_PICTURE = "a picture of the cost curves"
_WIDTH = "width (anchor and drafts)"
_SAMPLER_TITLES = {"sampler_greedy": "greedy", "sampler": "drawing", "sampler_filtered": "drawing with filters"}


@contextmanager
def _progress() -> Iterator[Callable[[float], None]]:
    """A progress bar on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring", total=1.0)
        yield lambda share: progress.update(task, completed=share)


def show_profile(profile: Profile, console: Console) -> None:
    """Print a profile's costs, as they are scheduled with, for people."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        console.print(title, style="bold")  # a table wraps a title that is wider than itself
        shown = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in header:
            shown.add_column(name, justify="right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)

    batches = _batches_of(profile)
    for batch in batches:
        widths, contexts = _axes_of(profile, batch)
        of_batch = f", {batch} sequences" if batches != [1] else ""
        table(
            f"Target, ms a call by width and cached tokens{of_batch}",
            ("width", *map(str, contexts)),
            [(str(width), *(_ms(profile.target_s(batch, width, context)) for context in contexts)) for width in widths],
        )
        plain = {context: _plain_s(profile, batch, context) for context in contexts}
        # A single sequence may have drafts of several sizes; the longest first.
        of_drafts = profile.points["drafter"]
        blocks = sorted({point.width for point in of_drafts if point.batch == batch}, reverse=True)
        blocks = blocks or [max(point.width for point in of_drafts)]
        header, rows = ["cached tokens", "plain step, ms"], [[str(c), _ms(plain[c])] for c in contexts]
        for block in blocks:
            name = "draft" if len(blocks) == 1 else f"draft of {block}"
            header += [f"{name}, ms", f"{name} / plain step"]
            for row, context in zip(rows, contexts, strict=True):
                seconds = profile.draft_s(batch, context, block)
                row += [_ms(seconds), f"{100 * seconds / plain[context]:.1f} %"]
        table(f"Plain step and draft{of_batch}", header, rows)
        roles = [role for role in SAMPLER_ROLES if role in profile.points]
        table(
            f"Sampler, ms a call{of_batch}",
            ("width", *(_SAMPLER_TITLES[role] for role in roles)),
            [(str(w), *(_ms(profile.of_sampler(role).sampler_s(batch, w)) for role in roles)) for w in widths],
        )


def render_picture(profile: Profile) -> bytes:
    """The cost curves as a PNG: the target's milliseconds, and whole rounds in plain steps, by width.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    require_matplotlib(_PICTURE)
    from matplotlib.figure import Figure

    batches = _batches_of(profile)
    # Where several sequences share plain steps only, they have no curve by width.
    wide = [batch for batch in batches if len(_axes_of(profile, batch)[0]) > 1]
    rows = len(wide) + (wide != batches)
    figure = Figure(figsize=(11, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False)
    for row, batch in zip(panels, wide, strict=False):
        _draw_widths(row, profile, batch, f", {batch} sequences" if batches != [1] else "")
    if wide != batches:
        _draw_batches(panels[-1], profile, batches)
    figure.suptitle(f"{profile.device.gpu or profile.device.processor}, {profile.device.threads} threads")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130, metadata={"Software": None})
    return content.getvalue()


def _draw_widths(row: Sequence[Axes], profile: Profile, batch: int, of_batch: str) -> None:
    widths, contexts = _axes_of(profile, batch)
    block = profile.points["drafter"][0].width
    drafted = range(2, min(widths[-1], block + 1) + 1)  # beyond, calls are several sequences'
    for context in contexts:
        label = f"{context} cached tokens"
        curve = [1e3 * profile.target_s(batch, width, context) for width in range(1, widths[-1] + 1)]
        (line,) = row[0].plot(range(1, widths[-1] + 1), curve, label=label)
        _draw_points(row[0], profile, batch, context, line.get_color())
        plain, draft = _plain_s(profile, batch, context), profile.draft_s(batch, context)
        rounds = [
            (draft + profile.target_s(batch, width, context) + profile.sampler_s(batch, width)) / plain
            for width in drafted
        ]
        row[1].plot(drafted, rounds, marker="o", markersize=4, label=label)
    _label(row[0], f"Target{of_batch}", _WIDTH, "ms a call")
    _label(row[1], f"Round with a draft{of_batch}", _WIDTH, "plain steps it takes the time of")
    row[1].axhline(1.0, color="grey", linewidth=1)


def _draw_batches(row: Sequence[Axes], profile: Profile, batches: Sequence[int]) -> None:
    for context in _axes_of(profile, batches[-1])[1]:
        label = f"{context} cached tokens"
        steps = [_plain_s(profile, batch, context) for batch in batches]
        row[0].plot(batches, [1e3 * step for step in steps], marker="o", markersize=4, label=label)
        rates = [batch / step for batch, step in zip(batches, steps, strict=True)]
        row[1].plot(batches, rates, marker="o", markersize=4, label=label)
    _label(row[0], "Plain step of several sequences", "sequences", "ms a step")
    _label(row[1], "Plain decoding of several sequences", "sequences", "tokens/s of all")


def _draw_points(axes: Axes, profile: Profile, batch: int, context: int, color: Any) -> None:
    """What was measured, with half the interquartile range to either side."""
    points = [point for point in profile.points["target"] if (point.batch, point.context) == (batch, context)]
    medians = [1e3 * point.median_s for point in points]
    ranges = [1e3 * point.median_s * point.spread / 2 for point in points]
    axes.errorbar([point.width for point in points], medians, ranges, fmt="o", markersize=4, capsize=2, color=color)


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def _batches_of(profile: Profile) -> list[int]:
    return sorted({point.batch for point in profile.points["target"]})


def _axes_of(profile: Profile, batch: int) -> tuple[list[int], list[int]]:
    """Widths and contexts at which the target was measured with so many sequences."""
    points = [point for point in profile.points["target"] if point.batch == batch]
    widths, contexts = zip(*((point.width, point.context) for point in points), strict=True)
    return sorted(set(widths)), sorted(set(contexts))


def _plain_s(profile: Profile, batch: int, context: int) -> float:
    return profile.target_s(batch, 1, context) + profile.sampler_s(batch, 1)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds >= 1e-4 else f"{1e3 * seconds:.4f}"


def _check_picture(path: Path) -> None:
    """Refuse a picture before a measurement, not behind it."""
    require_matplotlib(_PICTURE)
    check_file_path(path)


def _write_picture(profile: Profile, picture: Path | None, beside: Path) -> Path | None:
    """Draw where it was asked for, else beside the profile, if it can be drawn."""
    try:
        content = render_picture(profile)
    except MissingDependencyError:
        if picture is not None:
            raise
        return None
    target = (picture or beside.with_suffix(".png")).absolute()
    replace_file(target, content)
    return target


def _measure(bundle: Bundle, choice: EngineChoice, given: Mapping[str, Any]) -> Profile:
    budget_s = _BUDGET_S if given["budget"] is None else given["budget"]
    with choice.open(bundle) as engine, _progress() as progress:
        batches = given["batches"] or usual_batches(engine)
        plan = plan_profile(bundle.manifest, given["widths"], given["contexts"], batches, budget_s)
        device = choice.device()
        check_writable(bundle, device)
        return profile_engine(engine, plan, device, progress)


def _stored(bundle: Bundle, choice: EngineChoice, given: Mapping[str, Any]) -> tuple[Profile, Device]:
    """The bundle's profile of this device, and the device as it is now."""
    if unused := [f"--{name}" for name, value in given.items() if value]:
        raise InvalidInputError(f"--show measures nothing, so {', '.join(unused)} would do nothing; leave it out")
    with waiting("reading the profile"):
        device = choice.device()
        profile = Profile.load(bundle, device)
    if profile is None:
        raise BundleError(
            f"the bundle {bundle.path} has no {profile_name(device)}, the profile of this device; "
            "measure it with `dspark-edge profile`"
        )
    return profile, device


def _warnings(profile: Profile, device: Device, bundle: Bundle) -> Iterator[str]:
    for reason in stale_reasons(profile, device, bundle):
        yield f"the profile is stale: {reason}; measure it anew with `dspark-edge profile`"
    spreads = sorted(point.spread for point in profile.points["target"])
    if spreads[len(spreads) // 2] > _UNEVEN:
        yield (
            f"half of the target's costs differ by more than {100 * spreads[len(spreads) // 2]:.0f} % of their median "
            "(interquartile range); close what else uses the machine and measure again"
        )


@click.command(no_args_is_help=True)
@bundle_argument
@backend_options
@click.option(
    "--widths", callback=whole_numbers, metavar="1,2,4", help="Tokens a call; 1 and γ + 1 are always measured."
)
@click.option(
    "--contexts", callback=whole_numbers, metavar="128,2048", help="Cached tokens.  [default: up to the capacity]"
)
@click.option(
    "--batches", callback=whole_numbers, metavar="1,2", help="Sequences at once.  [default: 1,2,4,8 on the CPU]"
)
@click.option("--budget", type=float, help=f"Seconds to measure for.  [default: {_BUDGET_S:g}]")
@click.option(
    "--picture",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Draw the cost curves here.  [default: beside the profile, where matplotlib is installed]",
)
@click.option("--show", is_flag=True, help="Measure nothing: show the stored profile, and whether it still holds.")
@click.option("--json", "as_json", is_flag=True, help="The profile as JSON on stdout.")
def profile(
    bundle: Path,
    picture: Path | None,
    show: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure what rounds of BUNDLE cost on this device, and write it into the bundle for scheduling.

    Takes about a minute on an idle machine. Nothing is written before all is measured.
    """
    choice, opened = engine_choice(given), Bundle.open(bundle)
    if picture is not None:
        _check_picture(picture)
    if show:
        measured, device = _stored(opened, choice, given)
        path, drawn = opened.path / profile_name(device), None
        if picture is not None:
            drawn = _write_picture(measured, picture, path)
    else:
        measured = _measure(opened, choice, given)
        device, path = measured.device, measured.save(opened)
        drawn = _write_picture(measured, picture, path)
    if as_json:
        facts = {"path": str(path), "picture": None if drawn is None else str(drawn)}
        click.echo(json.dumps({**facts, **measured.to_json()}, indent=1, ensure_ascii=False))
    else:
        from rich.console import Console

        show_profile(measured, Console(width=None if sys.stdout.isatty() else 120))
        for written in (path, drawn):
            if written is not None:
                click.echo(str(written))
    for warning in _warnings(measured, device, opened):
        click.echo(f"Warning: {warning}", err=True)
