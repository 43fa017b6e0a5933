"""The command line. Parses, calls the library, prints; a command's module is imported when it is asked for.

Errors that the user can mend are one line on stderr and exit code 2; exit code 1 is a comparison that failed.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from importlib import import_module, metadata
from types import FrameType

import click

from dspark_edge.engines.errors import DSparkError, MissingDependencyError

__all__ = ["COMMANDS", "cli", "main", "waiting"]

# command → ("module:function", the line that --help shows). Strings, so that listing commands imports none of them.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "export": ("dspark_edge.exporter.cli:export", "Export a target and its drafter to a bundle."),
    "inspect": ("dspark_edge.runtime.cli.inspect:inspect", "Show what a bundle holds, and check its files."),
    "parity": ("dspark_edge.exporter.cli:parity", "Compare a bundle with its checkpoints in torch, output by output."),
    "plan": ("dspark_edge.exporter.planning_cli:plan", "Say what fits on a device, and how fast it may be."),
    "build": ("dspark_edge.runtime.cli.build:build", "Build TensorRT engines of a bundle."),
    "generate": ("dspark_edge.runtime.cli.generate:generate", "Answer prompts."),
    "chat": ("dspark_edge.runtime.cli.chat:chat", "Talk to a model."),
    "profile": ("dspark_edge.runtime.cli.profile:profile", "Measure what rounds cost on this device."),
    "bench": ("dspark_edge.runtime.cli.bench:bench", "Measure what each mode brings on this device."),
    "respond": ("dspark_edge.trainer.responses.cli:respond", "Write a target's own answers, to train a drafter on."),
    "train": ("dspark_edge.trainer.training.cli:train", "Train a drafter for a target."),
    "evaluate": ("dspark_edge.trainer.evaluation.cli:evaluate_command", "Measure a bundle on prompts."),
    "calibrate": ("dspark_edge.trainer.evaluation.cli:calibrate_command", "Fit a bundle's confidences to prompts."),
    "doctor": ("dspark_edge.runtime.cli.doctor:doctor", "Say what this machine can do, and how to add what it cannot."),
}

_WITH_TORCH = ("dspark_edge.exporter.cli", "dspark_edge.exporter.planning_cli", "dspark_edge.trainer.training.cli")


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on stderr, where that is a terminal, while something takes more than a moment."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(what):
        yield


class _LazyGroup(click.Group):
    """Knows its commands by name and imports the one that is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module_name, attribute = COMMANDS[cmd_name][0].split(":")
        try:
            with waiting("loading torch") if module_name in _WITH_TORCH else nullcontext():
                module = import_module(module_name)
        except ModuleNotFoundError as error:
            missing = (error.name or "").split(".")[0]
            if missing == "dspark_edge":
                raise
            extra = "train" if module_name.startswith("dspark_edge.trainer") else "export"
            raise MissingDependencyError(missing, f"dspark-edge {cmd_name}", extra) from error
        command: click.Command = getattr(module, attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


def _version() -> str:
    try:
        return metadata.version("dspark-edge")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(_version(), prog_name="dspark-edge")
def cli() -> None:
    """Run a language model with its DSpark drafter: faster, and token for token the same."""


def _terminate(signum: int, frame: FrameType | None) -> None:
    """Leave through the open `with` blocks, so that nothing half-written stays."""
    raise SystemExit(128 + signum)


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as leave:
        sys.exit(leave.exit_code)
    except click.ClickException as error:  # wrong usage; exit code 2
        error.show()
        sys.exit(error.exit_code)
    except DSparkError as error:
        click.echo(f"Error: {' '.join(str(error).split())}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted.", err=True)
        sys.exit(130)
