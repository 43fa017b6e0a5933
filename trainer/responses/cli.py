"""dspark-edge respond."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import InvalidInputError, MissingDependencyError
from dspark_edge.engines.opening import EngineChoice
from dspark_edge.runtime.cli.options import backend_options, engine_choice
from dspark_edge.runtime.generator import Generator
from dspark_edge.runtime.prompts import PromptRecord, read_prompt_records
from dspark_edge.trainer.compute_types import pick_compute_type
from dspark_edge.trainer.options import compute_type_option
from dspark_edge.trainer.responses.engine_responder import BatchResponder, GeneratorResponder
from dspark_edge.trainer.responses.plan import ResponseSettings, Script
from dspark_edge.trainer.responses.responders import Responder
from dspark_edge.trainer.responses.words import Words
from dspark_edge.trainer.responses.writer import Report, write_responses

__all__ = ["respond"]

_WAVE = 32


def parse_samples(given: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """Counts written as "2" or "math=2"."""
    counts = []
    for text in given:
        domain, _, count = text.rpartition("=")
        if not (count.isascii() and count.isdigit()):
            raise InvalidInputError(f"--samples is {text!r}, expected a number, or a domain and a number: math=2")
        counts.append((domain, int(count)))
    return tuple(counts)


@contextmanager
def _progress() -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("responses", total=None, speed="")

        def report(done: int, total: int, tokens: int) -> None:
            elapsed = progress.tasks[0].elapsed or 0.0
            speed = f"{tokens / elapsed:.0f} tokens/s" if tokens and elapsed else ""
            progress.update(task, completed=done, total=total, speed=speed)

        yield report


@click.command(no_args_is_help=True)
@click.option(
    "--bundle", "bundle_path", type=click.Path(path_type=Path), help="Whose words to write.  [default: --target's]"
)
@click.option("--prompts", type=click.Path(path_type=Path), metavar="FILE.jsonl", help="One prompt a line.")
@click.option("--synthesise", type=int, default=0, show_default=True, help="Prompts that the target writes itself.")
@click.option(
    "--openings",
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="How those begin, a line each, in turn: prompts that the target goes on with.  [default: with nothing]",
)
@click.option(
    "--synthesised-turns", type=int, default=1, show_default=True, help="Turns of conversations that it writes itself."
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE.jsonl")
@click.option("--target", help="Run this checkpoint in torch instead of the bundle's graphs.")
@click.option("--device", default="cpu", show_default=True, help="Where --target runs: cpu, cuda, cuda:1 …")
@compute_type_option
@click.option("--max-new-tokens", type=int, default=256, show_default=True)
@click.option("--max-length", type=int, help="Leave out prompts that would get longer.  [default: the capacity]")
@click.option(
    "--samples", multiple=True, metavar="[DOMAIN=]N", help="Responses to a prompt.  [default: 1]  May be repeated."
)
@click.option(
    "--greedy-share", type=float, default=0.5, show_default=True, help="Prompts whose first response is greedy."
)
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Of all other responses.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--wave", type=int, help="Sequences decoded together.  [default: 32, or what the bundle decodes at most]")
@backend_options
def respond(
    bundle_path: Path | None,
    prompts: Path | None,
    openings: Path | None,
    output: Path,
    target: str | None,
    device: str,
    compute_type: str,
    samples: tuple[str, ...],
    wave: int | None,
    max_length: int | None,
    **given: Any,
) -> None:
    """Write the target's own answers to prompts, for a drafter to learn from. Started again, it goes on."""
    if prompts is None and not given["synthesise"]:
        raise InvalidInputError("nothing to answer: give --prompts, --synthesise or both")
    if openings is not None and not given["synthesise"]:
        raise InvalidInputError("--openings begin what the target writes itself; say with --synthesise how much")
    choice = engine_choice(given)
    if choice.threads is not None and choice.threads < 1:
        raise InvalidInputError(f"threads is {choice.threads}, expected at least 1")
    if max_length is not None and max_length < 2:
        raise InvalidInputError(f"max_length is {max_length}, expected at least 2 tokens")
    bundle = None if bundle_path is None else Bundle.open(bundle_path)
    wave = _wave(bundle, target, wave)
    settings = ResponseSettings(samples=parse_samples(samples) or (("", 1),), wave=wave, **given)
    records: list[PromptRecord] = read_prompt_records(prompts) if prompts is not None else []
    begun: list[PromptRecord] = read_prompt_records(openings) if openings is not None else []
    # Before the target is loaded, which takes a while.
    words = _words(bundle, target)
    longest = words.capacity if max_length is None else min(max_length, words.capacity)
    identity = f"{words.identity} {'engine' if target is None else f'torch {compute_type}'}"
    script = Script(records, settings, words.tokenizer, words.template, longest, identity, words.vocab_size, begun)
    with ExitStack() as stack:
        if bundle is None or target is not None:
            # As many positions as are used: a target of 128 k would have tables for all of them.
            responder: Responder = _torch_responder(
                bundle, words, longest, target, device, compute_type, choice.threads
            )
        else:
            responder = _engine_responder(stack, bundle, choice)
        report = stack.enter_context(_progress())
        lines = write_responses(script, responder, output, report)
    skipped = f"; {script.skipped} were too long and left out" if script.skipped else ""
    click.echo(f"{output}: {lines} lines{skipped}", err=True)


def _words(bundle: Bundle | None, target: str | None) -> Words:
    if bundle is not None:
        return Words.of_bundle(bundle)
    if target is None:
        raise InvalidInputError("whose answers? give --bundle, --target or both")
    with _asking_for_torch():
        return Words.of_checkpoint(target)


@contextmanager
def _asking_for_torch() -> Iterator[None]:
    """Say what brings the packages that running a checkpoint needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("dspark_edge"):
            raise
        raise MissingDependencyError(error.name or "torch", "dspark-edge respond --target", "train") from error


def _wave(bundle: Bundle | None, target: str | None, given: int | None) -> int:
    """Sequences decoded together; a bundle that decodes one at a time still writes its answers wave by wave."""
    if bundle is None or target is not None:
        return _WAVE if given is None else given
    most = bundle.manifest.limits.max_batch
    if most == 1:
        return _WAVE if given is None else given
    if given is not None and given > most:
        raise InvalidInputError(f"--wave is {given}, the bundle decodes at most {most} sequences together")
    return min(_WAVE, most) if given is None else given


def _engine_responder(stack: ExitStack, bundle: Bundle, choice: EngineChoice) -> Responder:
    engine = stack.enter_context(choice.open(bundle))
    return GeneratorResponder(Generator(engine)) if bundle.manifest.limits.max_batch == 1 else BatchResponder(engine)


def _torch_responder(
    bundle: Bundle | None,
    words: Words,
    longest: int,
    target: str,
    device: str,
    compute_type: str,
    threads: int | None,
) -> Responder:
    with _asking_for_torch():
        import torch

        from dspark_edge.trainer.responses.torch_responder import TorchResponder
        from dspark_edge.trainer.target_model import TargetModel
        from dspark_edge.trainer.training.processes import pick_device

    if threads is not None:
        torch.set_num_threads(threads)
    where = pick_device(device)
    model = TargetModel.load(target, longest, where, pick_compute_type(compute_type, where))
    for name in ("vocab_size", "hidden_size", "num_layers", "num_attention_heads", "num_key_value_heads", "head_dim"):
        given, expected = getattr(model.config, name), None if bundle is None else getattr(bundle.manifest.target, name)
        if expected is not None and given != expected:
            raise InvalidInputError(
                f"{target} has a {name} of {given}, the bundle's target one of {expected}; give the target that the "
                "bundle was made from"
            )
    return TorchResponder(model, words.eos_ids)
