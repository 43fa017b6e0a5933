"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.opening import ENGINES, EngineChoice
from dspark_edge.runtime.cli import waiting
from dspark_edge.runtime.generator import MODES, Generator
from dspark_edge.runtime.sampling import SamplingParams

__all__ = [
    "backend_options",
    "bundle_argument",
    "counting",
    "engine_choice",
    "engine_options",
    "numbers",
    "open_generator",
    "sampling_options",
    "sampling_params",
    "summary",
    "whole_numbers",
]

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))


def _combine(options: list[Decorator]) -> Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


backend_options = _combine(
    [
        click.option(
            "--engine",
            type=click.Choice(ENGINES),
            default="onnxruntime",
            show_default=True,
            help="What runs the graphs; TensorRT's engines are built by `dspark-edge build`.",
        ),
        click.option("--provider", help="Of ONNX Runtime: cpu, cuda, or a provider's full name.  [default: cpu]"),
        click.option("--threads", type=int, help="Threads on the CPU.  [default: all cores]"),
    ]
)

engine_options = _combine(
    [
        click.option(
            "--mode",
            type=click.Choice(MODES),
            help="plain: the target alone; static: verify a whole block every round; scheduled: draft and verify what "
            "pays on this device.  [default: scheduled once `dspark-edge profile` has run, static before]",
        ),
        click.option("--verify-length", type=int, help="Draft tokens verified a round.  [default: the block]"),
        click.option("--prefill-chunk", type=int, help="Most prompt tokens a call.  [default: 256]"),
        click.option(
            "--bit-exact",
            is_flag=True,
            help="The same answer to the last bit, however it is decoded; plain steps are as dear as verifications.",
        ),
        backend_options,
    ]
)

sampling_options = _combine(
    [
        click.option("--max-new-tokens", type=int, default=256, show_default=True),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
        click.option("--top-k", type=int, default=0, show_default=True, help="0 is off."),
        click.option("--top-p", type=float, default=1.0, show_default=True, help="1 is off."),
        click.option("--min-p", type=float, default=0.0, show_default=True, help="0 is off."),
        click.option("--seed", type=int, help="Equal seeds give equal answers.  [default: a new one every time]"),
        click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; repeatable."),
        click.option("--ignore-eos", is_flag=True, help="Go on behind the end-of-text token."),
    ]
)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of (done, in all) on a terminal's stderr."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

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


def numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[float, ...]:
    """An option's numbers, written as "0,0.5,1", each once."""
    try:
        return tuple(dict.fromkeys(float(part) for part in (text or "").split(",") if part.strip()))
    except ValueError:
        raise InvalidInputError(
            f"{parameter.opts[0]} is {text!r}, expected numbers with commas, such as 1,2,4"
        ) from None


def whole_numbers(context: click.Context, parameter: click.Parameter, text: str | None) -> tuple[int, ...]:
    """An option's whole numbers, written as "1,2,4", each once."""
    numbers(context, parameter, text)
    try:
        return tuple(dict.fromkeys(int(part) for part in (text or "").split(",") if part.strip()))
    except ValueError:
        raise InvalidInputError(f"{parameter.opts[0]} is {text!r}, expected whole numbers, such as 1,2,4") from None


def open_generator(bundle: Path, given: dict[str, Any]) -> Generator:
    """Open a bundle with the values of `engine_options`, which are taken out of `given`."""
    names = ("mode", "verify_length", "prefill_chunk", "bit_exact", "engine", "provider", "threads")
    with waiting("loading the bundle"):
        return Generator.open(bundle, **{name: given.pop(name) for name in names})


def engine_choice(given: dict[str, Any]) -> EngineChoice:
    """The values of `backend_options`, which are taken out of `given`."""
    return EngineChoice(**{name: given.pop(name) for name in ("engine", "provider", "threads")})


def sampling_params(given: dict[str, Any]) -> SamplingParams:
    """The values of `sampling_options`, which are taken out of `given`."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop", "ignore_eos")
    return SamplingParams(**{name: given.pop(name) for name in names})


def summary(statistics: Any) -> str:
    """One line about a generation."""
    return (
        f"{statistics.new_tokens} tokens, {statistics.tokens_per_second:.1f} tokens/s, "
        f"first after {statistics.time_to_first_token_s:.2f} s, "
        f"accepted length {statistics.mean_accepted_length:.2f}"
    )
