"""A target and its responses in, a drafter out: the steps around the training loop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.machine import installed_version
from dspark_edge.exporter.checkpoint import open_checkpoint
from dspark_edge.exporter.configuration import DecoderConfig, DrafterConfig, read_decoder_config
from dspark_edge.runtime.reporting.html_page import require_matplotlib
from dspark_edge.trainer.compute_types import check_compute_type, pick_compute_type
from dspark_edge.trainer.memory import format_bytes
from dspark_edge.trainer.target_model import TargetModel
from dspark_edge.trainer.training.checkpoints import drafter_config_json, save_drafter, write_text
from dspark_edge.trainer.training.continuation import read_shape, read_vocabulary
from dspark_edge.trainer.training.dataset import Example, Split, hash_examples, read_examples, split_examples
from dspark_edge.trainer.training.features import FeatureStore
from dspark_edge.trainer.training.initialization import WARM_STARTS
from dspark_edge.trainer.training.metrics_file import PLOT, plot_metrics
from dspark_edge.trainer.training.processes import Processes, open_processes
from dspark_edge.trainer.training.settings import DrafterSettings, TrainingSettings
from dspark_edge.trainer.training.trainer import CHECKPOINT_NAME, METRICS_NAME, Outcome, Progress, Trainer
from dspark_edge.trainer.training.vocabulary import choose_draft_vocabulary, coverage

__all__ = ["Listener", "Resources", "train_drafter"]

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Resources:
    """Where a run works, and what it may use.

    Raises:
        InvalidInputError: a value is out of range.
    """

    device: str | None = None  # None: a GPU where there is one
    cache: Path | None = None  # the feature cache's folder; None: beside the checkpoints, removed in the end
    cache_bytes: int = 8_000_000_000
    compute_type: str = "auto"  # of target and drafter while they are computed, see `COMPUTE_TYPES`
    max_length: int | None = None  # sequences are cut behind so many tokens
    dtype: str = "fp16"  # of the drafter on disk
    copies: bool = False  # write copies of the target's embedding and head, too

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise InvalidInputError(f"dtype is {self.dtype!r}, expected one of: {', '.join(_DTYPES)}")
        check_compute_type(self.compute_type)
        if self.cache_bytes < 0:
            raise InvalidInputError(f"the cache is {self.cache_bytes} bytes, expected 0 (none) or more")
        if self.max_length is not None and self.max_length < 3:
            raise InvalidInputError(f"max_length is {self.max_length}, expected at least 3 tokens")


@dataclass(frozen=True, slots=True)
class Listener:
    """Hears of a run; each does nothing unless it is given."""

    say: Callable[[str], None] = lambda line: None
    features: Callable[[int, int], None] = lambda done, total: None  # tokens
    step: Callable[[Progress], None] = lambda progress: None


def train_drafter(
    target: str | Path,
    responses: Sequence[Path],
    output: Path,
    drafter: DrafterSettings,
    training: TrainingSettings,
    resources: Resources | None = None,
    listener: Listener | None = None,
    overwrite: bool = False,
    counted: Sequence[Path] = (),
) -> Outcome:
    """Train a drafter and write it as a checkpoint; started again after an interruption, it goes on.

    Args:
        target: a folder, a GGUF file or a Hugging Face name.
        responses: JSON Lines files that `dspark-edge respond` wrote.
        output: the drafter's folder; also holds the run's checkpoint, metrics and plot.
        drafter: its shape.
        training: how it is trained.
        resources: device, cache and types.
        listener: hears of progress.
        overwrite: begin anew, whatever the folder holds of an earlier run.

    Raises:
        InvalidInputError: responses or settings cannot be used, memory or disk are too small, or the folder holds a
            finished drafter or another run.
        CheckpointError: the target or the run's checkpoint is missing, damaged or unsupported.
        MissingDependencyError: matplotlib is not installed.
    """
    resources, listener = resources or Resources(), listener or Listener()
    require_matplotlib(PLOT)
    with open_processes(resources.device) as processes:
        # In a function of its own: nothing that talks to other processes is left when it returns.
        return _train(target, responses, output, drafter, training, resources, listener, overwrite, counted, processes)


def _train(
    target: str | Path,
    responses: Sequence[Path],
    output: Path,
    drafter: DrafterSettings,
    training: TrainingSettings,
    resources: Resources,
    listener: Listener,
    overwrite: bool,
    counted: Sequence[Path],
    processes: Processes,
) -> Outcome:
    """`train_drafter` in one of the processes."""
    if processes.first:
        _prepare_folder(output, overwrite)
    processes.wait()
    given = _read(target, responses, counted, drafter, training, resources, listener)
    split, shape = given.split, given.shape
    compute_type = pick_compute_type(resources.compute_type, processes.device)
    if processes.device.type == "cuda" and compute_type == torch.bfloat16:
        # What stays in fp32 (fc, Muon's products) has fp32's range to keep, not all of its digits.
        torch.set_float32_matmul_precision("high")
    model = TargetModel.load(target, given.longest, processes.device, compute_type)
    with _Stores(model, split, shape.tap_layers, output, resources, listener, processes) as stores:
        trainer = Trainer(model, shape, split, stores, given.vocabulary, training, output, processes)
        parameters = sum(parameter.numel() for parameter in trainer.drafter.parameters())
        listener.say(
            f"drafter: {parameters / 1e6:.1f} M parameters; {len(split.train)} responses to train on, "
            f"{len(split.held_out)} held out; on {processes.count} × {processes.device.type}"
        )
        outcome = trainer.run(listener.step)
        if processes.first:
            final = drafter_config_json(outcome.drafter, given.target_config, training.anchors)
            copies = model if resources.copies else None
            save_drafter(output, outcome.drafter, final, _DTYPES[resources.dtype], given.vocabulary, copies)
            write_text(
                output / "training.json",
                _provenance(target, responses, split, drafter, training, outcome, compute_type),
            )
            plot_metrics(output / METRICS_NAME, output / "training.png")
        trainer.finish()
    listener.say(f"a step took {outcome.median_step_s:.2f} s (median); peak memory {format_bytes(outcome.peak_memory)}")
    return outcome


@dataclass(frozen=True, slots=True)
class _Given:
    """What a run begins with."""

    target_config: dict[str, Any]  # config.json
    split: Split
    longest: int  # tokens of a sequence
    shape: DrafterConfig
    vocabulary: np.ndarray | None  # [P] ids that the drafter drafts; None: all


def _read(
    target: str | Path,
    responses: Sequence[Path],
    counted: Sequence[Path],
    drafter: DrafterSettings,
    training: TrainingSettings,
    resources: Resources,
    listener: Listener,
) -> _Given:
    with open_checkpoint(target) as checkpoint:
        target_config = dict(checkpoint.config)
        config = read_decoder_config(target_config, str(target))
    examples = read_examples(responses, config.vocab_size, resources.max_length)
    split = split_examples(examples, training.held_out)
    if training.only == "all":
        shape = drafter.shape(config, _mask_token(drafter, training, examples, config))
        more = read_examples(counted, config.vocab_size, resources.max_length) if counted else []
        vocabulary = _draft_vocabulary(shape, split, more, listener)
    else:  # of a drafter that stays as it is
        shape, vocabulary = read_shape(Path(training.warm_start)), read_vocabulary(Path(training.warm_start))
        shape = replace(shape, confidence_with_draft_probs=shape.confidence and drafter.confidence_draft_probs)
    return _Given(target_config, split, max(len(example) for example in examples), shape, vocabulary)


def _draft_vocabulary(
    shape: DrafterConfig, split: Split, more: Sequence[Example], listener: Listener
) -> np.ndarray | None:
    """[P] ids that the drafter drafts; None: the whole vocabulary. What is held out is not counted."""
    if shape.draft_vocab_size is None:
        return None
    size = shape.backbone.vocab_size
    held_out = {example.group for example in split.held_out}
    counted = [*split.train, *(example for example in more if example.group not in held_out)]
    vocabulary = choose_draft_vocabulary(counted, size, shape.draft_vocab_size)
    share = coverage(split.held_out, size, vocabulary)
    listener.say(f"draft vocabulary: {len(vocabulary)} tokens, {share:.2%} of the held-out responses")
    return vocabulary


def _mask_token(
    drafter: DrafterSettings, training: TrainingSettings, examples: Sequence[Example], config: DecoderConfig
) -> int:
    """The one that is asked for, that of the drafter to go on from, or one that is free."""
    if drafter.mask_token_id is not None:
        return drafter.mask_token_id
    if training.warm_start not in WARM_STARTS:
        return read_shape(Path(training.warm_start)).mask_token_id
    return unused_token(examples, config)


def unused_token(examples: Sequence[Example], config: DecoderConfig) -> int:
    """The highest id that no example uses, as the mask: its embedding means nothing else to the target."""
    used = np.zeros(config.vocab_size, dtype=bool)
    for example in examples:
        used[example.token_ids] = True
    free = np.flatnonzero(~used)
    if not len(free):
        raise InvalidInputError("the responses use every token of the vocabulary; name one with --mask-token-id")
    return int(free[-1])


def _prepare_folder(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise InvalidInputError(f"{output} is a file; give a folder")
    if overwrite:
        for name in (
            CHECKPOINT_NAME,
            METRICS_NAME,
            "model.safetensors",
            "config.json",
            "training.json",
            "training.png",
        ):
            (output / name).unlink(missing_ok=True)
    elif (output / "model.safetensors").exists():
        raise InvalidInputError(f"{output} holds a finished drafter already; give another folder, or --overwrite")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(f"cannot make {output}: {error.strerror or error}") from None


class _Stores(AbstractContextManager[tuple[FeatureStore, FeatureStore]]):
    """The feature stores of both parts, filled; a cache that was nobody's choice is removed in the end."""

    def __init__(
        self,
        model: TargetModel,
        split: Split,
        taps: Sequence[int],
        output: Path,
        resources: Resources,
        listener: Listener,
        processes: Processes,
    ) -> None:
        self._folder = resources.cache or output / "features"
        self._temporary = resources.cache is None
        self._listener, self._processes = listener, processes
        # The held-out part is visited again and again: it comes first.
        aside = FeatureStore(model, split.held_out, taps, self._folder / "held_out", resources.cache_bytes)
        rest = resources.cache_bytes - aside.size
        self._train = FeatureStore(model, split.train, taps, self._folder / "train", rest)
        self._aside = aside

    def __enter__(self) -> tuple[FeatureStore, FeatureStore]:
        for store in (self._aside, self._train):
            self._listener.say(store.describe())
        # One process computes, the others read what it has written.
        if self._processes.first:
            for store in (self._aside, self._train):
                store.fill(self._listener.features)
        self._processes.wait()
        if not self._processes.first:
            for store in (self._aside, self._train):
                store.fill()
        return self._train, self._aside

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        for store in (self._aside, self._train):
            store.close()
        self._processes.wait() if kind is None else None
        if self._temporary and kind is None and self._processes.first:
            shutil.rmtree(self._folder, ignore_errors=True)


def _provenance(
    target: str | Path,
    responses: Sequence[Path],
    split: Split,
    drafter: DrafterSettings,
    training: TrainingSettings,
    outcome: Outcome,
    compute_type: torch.dtype,
) -> str:
    """What the drafter was made of, as JSON."""
    versions = {name: installed_version(name) for name in ("dspark-edge", "torch", "numpy")}
    content = {
        "target": Path(target).name,
        "responses": [path.name for path in responses],
        "responses_sha256": {"train": hash_examples(split.train), "held_out": hash_examples(split.held_out)},
        "response_tokens": int(sum(end - first for example in split.train for first, end in example.answers)),
        "drafter": asdict(drafter),
        "training": {**asdict(training), "warm_start": Path(training.warm_start).name},
        "compute_type": str(compute_type).removeprefix("torch."),
        "held_out": {"tau_greedy": outcome.tau_greedy, "tau_sampled": outcome.tau_sampled},
        "median_step_s": outcome.median_step_s,
        "peak_memory_bytes": outcome.peak_memory,
        "versions": {name: version for name, version in versions.items() if version},
    }
    return json.dumps(content, indent=2) + "\n"
