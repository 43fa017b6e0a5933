"""dspark-edge train."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.trainer.options import compute_type_option
from dspark_edge.trainer.training.initialization import WARM_STARTS
from dspark_edge.trainer.training.objective import CONFIDENCE_TARGETS
from dspark_edge.trainer.training.settings import HEADS, OPTIMIZERS, PARTS, DrafterSettings, TrainingSettings
from dspark_edge.trainer.training.train import Listener, Resources, train_drafter
from dspark_edge.trainer.training.trainer import Progress

__all__ = ["train"]


def parse_taps(text: str) -> tuple[int, ...] | None:
    """Layers written as "1,10,28"; "auto" is None."""
    if text == "auto":
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InvalidInputError(f"--taps is {text!r}, expected auto, or layers with commas, such as 1,10,28") from None


@contextmanager
def _listener() -> Iterator[Listener]:
    """Bars on a terminal, lines now and then elsewhere."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    console = Console(stderr=True)
    with Bars(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int, note: str = "") -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total, note=note)
            bars.update(tasks[name], completed=done, total=total, note=note)

        def step(progress: Progress) -> None:
            note = f"loss {progress.loss:.3f}  {progress.step_s:.2f} s/step"
            if progress.tau_greedy is not None:
                note += f"  τ {progress.tau_greedy:.2f}"
            if progress.tau_sampled is not None:
                note += f"  τ(T=1) {progress.tau_sampled:.2f}"
            show("training", progress.step, progress.steps, note)
            if not console.is_terminal and (progress.step % 100 == 0 or progress.step == progress.steps):
                click.echo(f"step {progress.step}/{progress.steps}: {note}", err=True)

        yield Listener(
            say=lambda line: console.print(line, highlight=False, soft_wrap=True),
            features=lambda done, total: show("features", done, total),
            step=step,
        )


@click.command(no_args_is_help=True)
@click.option("--target", required=True, help="A folder, a .gguf file, or a Hugging Face name.")
@click.option(
    "--responses",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="What dspark-edge respond wrote. May be repeated.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The drafter's folder.")
@click.option("--layers", type=int, default=2, show_default=True)
@click.option("--block-size", type=int, default=7, show_default=True, help="Tokens of a draft.")
@click.option("--taps", default="auto", show_default=True, help="Layers of the target, such as 1,10,28; -1: embedding.")
@click.option("--markov-rank", type=int, default=64, show_default=True)
@click.option("--head", type=click.Choice(HEADS), default="vanilla", show_default=True, help="The sequential head.")
@click.option("--confidence/--no-confidence", default=True, show_default=True, help="A confidence head.")
@click.option(
    "--confidence-draft-probs/--no-confidence-draft-probs",
    default=True,
    show_default=True,
    help="The confidence head sees how sure the draft's distribution is.",
)
@click.option("--key-value-heads", type=int, help="Of the drafter's attention.  [default: the target's]")
@click.option("--draft-vocab", type=int, help="Draft only from so many of the commonest tokens.  [default: all]")
@click.option(
    "--count",
    "counted",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE.jsonl",
    help="More responses, only to choose the draft vocabulary from. May be repeated.",
)
@click.option("--mask-token-id", type=int, help="[default: a token that the responses never use]")
@click.option("--steps", type=int, default=2000, show_default=True)
@click.option("--batch", type=int, default=8, show_default=True, help="Sequences a step.")
@click.option("--anchors", type=int, default=48, show_default=True, help="Blocks a sequence.")
@click.option("--prompt-anchors", type=float, default=0.0, show_default=True, help="Share of the blocks in prompts.")
@click.option(
    "--short-share", type=float, default=0.5, show_default=True, help="Of the steps, at first, on shorter, more blocks."
)
@click.option("--short-block", type=int, default=3, show_default=True, help="Tokens of a shorter block.")
@click.option("--learning-rate", type=float, default=2e-3, show_default=True)
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), default="muon", show_default=True)
@click.option("--warmup", type=int, default=100, show_default=True, help="Steps.")
@click.option("--weight-decay", type=float, default=0.01, show_default=True)
@click.option("--clip", type=float, default=1.0, show_default=True, help="Largest norm of the gradients.")
@click.option(
    "--cross-entropy", type=float, default=0.1, show_default=True, help="Weight of that with the tokens that came."
)
@click.option(
    "--confidence-target",
    type=click.Choice(CONFIDENCE_TARGETS),
    default="overlap",
    show_default=True,
    help="Confidence in what: sampling, or in greedy responses greedy decoding.",
)
@click.option(
    "--divergence",
    type=float,
    default=1.0,
    show_default=True,
    help="Weight, at first, of the cross-entropy with the target's distribution; 0 is the reference's loss.",
)
@click.option("--divergence-share", type=float, default=0.5, show_default=True, help="Of the steps, until it is 0.")
@click.option(
    "--regression", type=float, default=0.0, show_default=True, help="Weight, at first, of the states' distance."
)
@click.option(
    "--warm-start",
    default="recent",
    show_default=True,
    metavar=f"[{'|'.join(WARM_STARTS)}|FOLDER]",
    help="What to start from; a drafter's FOLDER: go on from it.",
)
@click.option(
    "--only",
    type=click.Choice(PARTS),
    default="all",
    show_default=True,
    help="confidence: train that head alone, of the drafter that --warm-start names.",
)
@click.option("--held-out", type=float, default=0.02, show_default=True, help="Share of the prompts.")
@click.option("--evaluate-every", type=int, default=200, show_default=True, help="Steps.")
@click.option("--checkpoint-every", type=int, default=200, show_default=True, help="Steps.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--max-length", type=int, help="Cut sequences behind so many tokens.")
@click.option("--cache", type=click.Path(path_type=Path), help="Keep the feature cache here for other runs.")
@click.option("--cache-gb", type=float, default=8.0, show_default=True, help="Most that the feature cache may take.")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: a GPU where there is one]")
@click.option("--threads", type=int, help="Threads on a CPU.  [default: all cores]")
@compute_type_option
@click.option(
    "--dtype", type=click.Choice(("fp32", "fp16", "bf16")), default="fp16", show_default=True, help="On disk."
)
@click.option("--copies", is_flag=True, help="Write copies of the target's embedding and head, too.")
@click.option("--overwrite", is_flag=True, help="Begin anew, whatever the folder holds.")
def train(
    target: str,
    responses: tuple[Path, ...],
    output: Path,
    taps: str,
    threads: int | None,
    overwrite: bool,
    cache_gb: float,
    counted: tuple[Path, ...],
    **given: Any,
) -> None:
    """Train a drafter on the target's responses. Started again after an interruption, it goes on.

    Several GPUs: torchrun --nproc-per-node N -m dspark_edge.runtime.cli train …
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    drafter_names = (
        "layers",
        "block_size",
        "markov_rank",
        "head",
        "confidence",
        "confidence_draft_probs",
        "draft_vocab",
        "mask_token_id",
        "key_value_heads",
    )
    resource_names = ("device", "compute_type", "cache", "max_length", "dtype", "copies")
    drafter = DrafterSettings(taps=parse_taps(taps), **{name: given.pop(name) for name in drafter_names})
    resources = Resources(cache_bytes=int(cache_gb * 1e9), **{name: given.pop(name) for name in resource_names})
    with _listener() as listener:
        settings = TrainingSettings(**given)
        train_drafter(target, responses, output, drafter, settings, resources, listener, overwrite, counted)
    click.echo(f"{output}: done", err=True)
