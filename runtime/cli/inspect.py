"""dspark-edge inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.manifest import Manifest, TensorSpec
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.cli.options import bundle_argument

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["inspect"]


def _verify(bundle: Bundle) -> tuple[str, ...]:
    """Check all hashes under a progress bar; names of files that are not part of the bundle."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("checking files", total=None)
        return bundle.verify(lambda done, total: progress.update(task, completed=done, total=total))


def _facts(manifest: Manifest) -> dict[str, str]:
    target, drafter, limits = manifest.target, manifest.drafter, manifest.limits
    packed = f", {manifest.packed_sequences} sequences in a packed call" if manifest.packed_sequences else ""
    heads = f"{target.num_attention_heads}/{target.num_key_value_heads} heads of {target.head_dim}"
    if drafter.kind == "ngram":
        described = f"ngram (prompt lookup), block {drafter.block_size}"
    else:
        head = f"{drafter.markov_head} head of rank {drafter.markov_rank}" if drafter.markov_rank else "no Markov head"
        described = (
            f"dspark, block {drafter.block_size}, {drafter.num_layers} layers, {head}, "
            f"{'with' if drafter.confidence else 'no'} confidence, taps {list(drafter.tap_layers)}"
        )
        if drafter.draft_vocab_size is not None:
            described += f", drafts {drafter.draft_vocab_size} of the {target.vocab_size} tokens"
    return {
        "target": f"{target.architecture}, {target.parameters / 1e6:.1f} M parameters, {target.num_layers} layers, "
        f"hidden {target.hidden_size}, {heads}, vocabulary {target.vocab_size}",
        "drafter": described,
        "lowering": f"{manifest.lowering}, opsets {dict(manifest.opsets)}",
        "precision": manifest.precision,
        "limits": f"capacity {limits.capacity} tokens, batch {limits.max_batch}" + packed,
        "made from": f"{manifest.provenance.target} + {manifest.provenance.drafter}, {manifest.provenance.created_at}",
    }


def _describe(tensors: tuple[TensorSpec, ...]) -> str:
    """The tensors of a graph, with a family of caches as one line."""
    lines: dict[str, str] = {}
    for tensor in tensors:
        parts = tensor.name.split(".")
        family = ".".join("*" if part.isdigit() else part for part in parts)
        lines.setdefault(family, f"{family} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]")
    return "\n".join(lines.values())


def _calibration_facts(calibration: Calibration | None) -> dict[str, str]:
    """What to say of a drafter with confidences."""
    if calibration is None:
        return {"calibration": "none; `dspark-edge calibrate` makes one"}

    def shares(errors: tuple[float | None, ...]) -> str:
        return " ".join("–" if error is None else f"{100 * error:.1f}" for error in errors)

    lines = [f"on {calibration.data.prompts} prompts (sha256 {calibration.data.sha256[:16]}…), ECE in % by position:"]
    lines += [
        f"temperature {fit.sampling_temperature:g}: {shares(fit.ece_before)} → {shares(fit.ece_after)}, "
        f"{fit.samples[0]} to {fit.samples[-1]} samples"
        for fit in calibration.fits
    ]
    return {"calibration": "\n".join(lines)}


def _show(bundle: Bundle, calibration: Calibration | None, console: Console) -> None:
    from rich.markup import escape
    from rich.table import Table

    manifest = bundle.manifest
    facts = Table(show_header=False, box=None)
    described = _facts(manifest) | (_calibration_facts(calibration) if manifest.drafter.confidence else {})
    for name, value in described.items():
        facts.add_row(name, escape(value))
    console.print(facts)
    graphs = Table("graph", "inputs", "outputs")
    for role, graph in manifest.graphs.items():
        graphs.add_row(role, escape(_describe(graph.inputs)), escape(_describe(graph.outputs)))
    console.print(graphs)
    files = Table("file", "bytes", "sha256")
    for record in manifest.files:
        files.add_row(record.path, f"{record.size:,}", record.sha256[:16] + "…")
    console.print(files)


@click.command(no_args_is_help=True)
@bundle_argument
@click.option("--verify", is_flag=True, help="Check the hash of every file.")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON, with the calibration.")
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show what BUNDLE holds."""
    opened = Bundle.open(bundle)
    calibration = Calibration.load(opened)
    strangers = _verify(opened) if verify else ()
    if as_json:
        added: dict[str, object] = {"calibration": calibration.to_json() if calibration else None}
        if verify:
            added |= {"verified": True, "unknown_files": list(strangers)}
        click.echo(json.dumps({**opened.manifest.to_json(), **added}, indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    _show(opened, calibration, console)
    if verify:
        console.print(f"all {len(opened.manifest.files)} files match their hashes", style="green")
        if strangers:
            console.print(f"not part of the bundle: {', '.join(strangers)}", style="yellow")
