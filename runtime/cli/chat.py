"""dspark-edge chat."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from dspark_edge.runtime.chat_template import Message
from dspark_edge.runtime.cli.options import (
    bundle_argument,
    engine_options,
    open_generator,
    sampling_options,
    sampling_params,
    summary,
)
from dspark_edge.runtime.generator import Generation, Generator
from dspark_edge.runtime.sampling import SamplingParams

__all__ = ["chat"]

_HELP = "/reset starts over, /exit or Ctrl-D ends, Ctrl-C stops an answer."


def _read_line() -> str | None:
    """The user's next line; None at the end of input."""
    try:
        if sys.stdin.isatty():
            import readline  # noqa: F401  (gives input() history and editing)
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _reply(generator: Generator, messages: list[Message], params: SamplingParams) -> Generation | None:
    """Stream one answer; Ctrl-C ends it early."""
    generation: Generation | None = None
    stream = generator.stream(messages, params)
    try:
        for piece in stream:
            click.echo(piece.text, nl=False)
            generation = piece.generation
    except KeyboardInterrupt:
        generator.cancel()
        for piece in stream:
            generation = piece.generation
    click.echo()
    return generation


@click.command(no_args_is_help=True)
@bundle_argument
@click.option("--system", help="A system message.")
@engine_options
@sampling_options
def chat(bundle: Path, system: str | None, **given: Any) -> None:
    """Talk to the model in BUNDLE; a turn prefills only what is new."""
    params = sampling_params(given)
    opening = [Message("system", system)] if system else []
    with open_generator(bundle, given) as generator:
        click.echo(_HELP, err=True)
        messages = list(opening)
        while (line := _read_line()) is not None:
            if line.strip() == "/exit":
                break
            if line.strip() == "/reset":
                messages = list(opening)
                continue
            if not line.strip():
                continue
            messages.append(Message("user", line))
            generation = _reply(generator, messages, params)
            if generation is None:
                messages.pop()
                continue
            messages.append(Message("assistant", generation.text))
            click.echo(summary(generation.statistics), err=True)
