"""Training a drafter: the loop, its measures, its checkpoints."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.exporter.configuration import DrafterConfig
from dspark_edge.trainer.compute_types import autocast
from dspark_edge.trainer.memory import available_memory, peak_memory
from dspark_edge.trainer.target_model import TargetModel
from dspark_edge.trainer.training.batches import Batch, batch_of_step, collate, draw_anchors
from dspark_edge.trainer.training.checkpoints import load_state, restore, save_state
from dspark_edge.trainer.training.dataset import Example, Split, hash_examples
from dspark_edge.trainer.training.drafter_model import TrainableDrafter
from dspark_edge.trainer.training.features import FeatureStore
from dspark_edge.trainer.training.initialization import initialize
from dspark_edge.trainer.training.loss import LossWeights
from dspark_edge.trainer.training.metrics_file import MetricsFile
from dspark_edge.trainer.training.muon import Muon
from dspark_edge.trainer.training.objective import Vocabulary, evaluate_blocks, step_loss
from dspark_edge.trainer.training.processes import Processes
from dspark_edge.trainer.training.settings import TrainingSettings

__all__ = ["CHECKPOINT_NAME", "METRICS_NAME", "Outcome", "Progress", "Trainer"]

CHECKPOINT_NAME = "checkpoint.safetensors"
METRICS_NAME = "metrics.jsonl"

_FINAL_LEARNING_RATE = 0.02  # of the largest, at the end of the cosine
_BETAS = (0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a listener hears of a step."""

    step: int
    steps: int
    loss: float
    step_s: float
    tau_greedy: float | None  # of the last evaluation
    tau_sampled: float | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run."""

    drafter: TrainableDrafter
    tau_greedy: float | None  # on held-out greedy responses; None where there are none
    tau_sampled: float | None
    median_step_s: float
    peak_memory: int  # bytes


class Trainer:
    """One run over one split.

    Args:
        target: the model that is drafted for; the drafter is computed in its type.
        shape: the drafter's.
        split: responses.
        stores: features of the training and of the held-out part, filled.
        vocabulary_ids: [P] int64, or None.
        settings: how it is trained.
        folder: checkpoints and metrics go here.
        processes: this process among all.
    """

    def __init__(
        self,
        target: TargetModel,
        shape: DrafterConfig,
        split: Split,
        stores: tuple[FeatureStore, FeatureStore],
        vocabulary_ids: np.ndarray | None,
        settings: TrainingSettings,
        folder: Path,
        processes: Processes,
    ) -> None:
        self._split, self._stores, self._settings, self._processes = split, stores, settings, processes
        self._device, self._compute_type = processes.device, target.dtype
        # A split smaller than a step's batch is seen several times a step's worth of steps, not refused.
        self._batch_size = min(settings.batch, len(split.train))
        longest = max(len(example) for example in (*split.train, *split.held_out))
        drafter = TrainableDrafter(shape, longest)
        initialize(drafter, target, settings.warm_start, settings.seed, stores[0].sample(), vocabulary_ids)
        if settings.only == "confidence":
            if drafter.confidence_head is None:
                raise InvalidInputError(f"{settings.warm_start} has no confidence head; there is nothing to train")
            drafter.requires_grad_(False)
            drafter.confidence_head.requires_grad_(True)
        self.drafter = drafter.to(self._device)
        self._vocabulary = shared_vocabulary(target, shape, vocabulary_ids, self._device)
        self.drafter.checkpoint_layers = _activations(shape, settings, longest) > available_memory(self._device) // 2
        self._wrapped = processes.wrap(self.drafter)
        self._optimizers = make_optimizers(self.drafter, settings)
        self._lengths = tuple(len(example) for example in split.train)
        self._checkpoint = folder / CHECKPOINT_NAME
        self._metrics = MetricsFile(folder / METRICS_NAME)
        said = [
            hash_examples(split.train),
            hash_examples(split.held_out),
            asdict(shape),
            {**asdict(settings), "evaluate_every": 0, "checkpoint_every": 0},
            None if vocabulary_ids is None else hashlib.sha256(vocabulary_ids.tobytes()).hexdigest(),
            target.fingerprint(),
        ]
        self._run_name = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]

    def run(self, listen: Callable[[Progress], None] | None = None) -> Outcome:
        """Train from the last checkpoint, or from the beginning, to the end.

        Raises:
            InvalidInputError: the folder holds another run, or a checkpoint cannot be written.
            CheckpointError: the checkpoint is damaged.
        """
        settings, processes = self._settings, self._processes
        start = self._resume()
        times: list[float] = []
        measured: tuple[float | None, float | None] = (None, None)
        with ThreadPoolExecutor(1) as loader:
            upcoming = loader.submit(self._batch, start)
            for step in range(start, settings.steps):
                began = perf_counter()
                batch = upcoming.result()
                if step + 1 < settings.steps:
                    upcoming = loader.submit(self._batch, step + 1)
                entry = self._step(step, batch)
                times.append(perf_counter() - began)
                last = step + 1 == settings.steps
                entry |= {"step": step + 1, "step_s": round(times[-1], 4)}
                if last or (step + 1) % settings.evaluate_every == 0:
                    held_out = self._evaluate()
                    measured = (held_out["tau_greedy"], held_out["tau_sampled"])
                    entry |= held_out
                if processes.first:
                    self._metrics.append(entry)
                    # Before the checkpoint, so that no run can be ahead of its metrics.
                    if (step + 1) % settings.checkpoint_every == 0 and not last:
                        self._metrics.sync()
                        save_state(self._checkpoint, self.drafter, self._optimizers, step + 1, self._run_name)
                    if listen is not None:
                        listen(Progress(step + 1, settings.steps, entry["loss"], times[-1], *measured))
        if processes.first:
            self._metrics.sync()
        # The first steps allocate and warm up.
        steady = sorted(times[2:] or times or [0.0])
        return Outcome(self.drafter, *measured, steady[len(steady) // 2], peak_memory(self._device))

    def finish(self) -> None:
        """Remove the checkpoint, once the drafter is saved."""
        if self._processes.first:
            self._checkpoint.unlink(missing_ok=True)

    def _resume(self) -> int:
        state = load_state(self._checkpoint, self._run_name)
        step = 0
        if state is not None:
            restore(state, self.drafter, self._optimizers)
            step = min(state.step, self._settings.steps)
        if self._processes.first:
            self._metrics.cut(step)
        self._processes.wait()
        return step

    def _batch(self, step: int) -> Batch:
        """This process's part of a step's sequences."""
        settings = self._settings
        epoch, chosen = batch_of_step(self._lengths, self._batch_size, settings.seed, step)
        mine = chosen[self._processes.rank :: self._processes.count]
        random = [np.random.default_rng((settings.seed, 2, epoch, index)) for index in mine]
        block, anchors = block_of_step(step, settings, self.drafter.config.block_size)
        return self._collate(self._split.train, self._stores[0], mine, random, block, anchors, settings.prompt_anchors)

    def _collate(
        self,
        examples: Sequence[Example],
        store: FeatureStore,
        chosen: Sequence[int],
        random: Sequence[np.random.Generator],
        block: int,
        count: int,
        prompt_share: float = 0.0,
    ) -> Batch:
        picked = [examples[index] for index in chosen]
        anchors = [
            draw_anchors(example, count, source, prompt_share) for example, source in zip(picked, random, strict=True)
        ]
        return collate(picked, store.load_all(chosen), anchors, block, self._device)

    def _step(self, step: int, batch: Batch) -> dict[str, Any]:
        settings, processes = self._settings, self._processes
        rate = learning_rate(step, settings)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad(set_to_none=True)
        with autocast(self._device, self._compute_type):
            helps = fading(step, settings)
            measures = step_loss(
                self._wrapped,
                self._vocabulary,
                batch,
                self._markov_w2(),
                LossWeights(settings.cross_entropy, divergence=settings.divergence * helps),
                settings.regression * helps,
                settings.confidence_target,
                self.drafter.peak_weights,
            )
        weight = processes.sum(measures.weight)
        # Gradients are averaged over the processes; the loss is a mean over the positions of all of them.
        (measures.loss * (processes.count / weight)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), settings.clip)
        for optimizer in self._optimizers:
            optimizer.step()
        sums = torch.stack((measures.loss.detach(), measures.cross_entropy, measures.overlap, measures.confidence_loss))
        loss, entropy, overlap, confidence = (processes.sum(sums.float()) / weight).tolist()
        return {
            "loss": loss,
            "cross_entropy": entropy,
            "overlap": overlap,
            "confidence_loss": confidence,
            "gradient_norm": float(norm),
            "learning_rate": rate,
        }

    def _markov_w2(self) -> torch.Tensor | None:
        head = self.drafter.markov_head
        return None if head is None else head.markov_w2.weight

    @torch.no_grad()
    def _evaluate(self) -> dict[str, Any]:
        """Accepted lengths and acceptance by position on the held-out part, always at the same anchors."""
        examples, store, block = self._split.held_out, self._stores[1], self.drafter.config.block_size
        # Σ τ₀, blocks₀, Σ τ₁, blocks₁, then per position Σ acceptance, Σ correct, samples
        sums = torch.zeros(4 + 3 * block, dtype=torch.float64, device=self._device)
        self.drafter.eval()
        size = max(1, self._batch_size)
        for number, start in enumerate(range(0, len(examples), size)):
            if number % self._processes.count != self._processes.rank:
                continue
            chosen = list(range(start, min(start + size, len(examples))))
            random = [np.random.default_rng((self._settings.seed, 3, index)) for index in chosen]
            batch = self._collate(examples, store, chosen, random, block, self._settings.anchors)
            with autocast(self._device, self._compute_type):
                measures = step_loss(self.drafter, self._vocabulary, batch, self._markov_w2())
            zero, one = evaluate_blocks(measures, batch)
            sums[:4] += torch.stack((zero.sum(), _count(zero), one.sum(), _count(one))).double()
            by_position = (measures.acceptance, measures.correct & batch.valid, batch.valid)
            sums[4:] += torch.cat([part.double().sum(dim=(0, 1)) for part in by_position])
        self.drafter.train()
        totals = self._processes.sum(sums)
        acceptance, correct, samples = totals[4:].reshape(3, block)
        return {
            "tau_greedy": _ratio(totals[0], totals[1]),
            "tau_sampled": _ratio(totals[2], totals[3]),
            "overlap_by_position": (acceptance / samples.clamp(min=1)).tolist(),
            "correct_by_position": (correct / samples.clamp(min=1)).tolist(),
        }


def shared_vocabulary(
    target: TargetModel, shape: DrafterConfig, ids: np.ndarray | None, device: torch.device
) -> Vocabulary:
    """The target's embedding and head, narrowed to the draft vocabulary, on the device."""
    size = shape.backbone.vocab_size
    if ids is None:
        head, rows = target.head, torch.arange(size)
    else:
        chosen = torch.from_numpy(ids)
        head = target.head.index_select(0, chosen.to(target.device))
        rows = torch.full((size,), -1, dtype=torch.int64)
        rows[chosen] = torch.arange(len(chosen))
    return Vocabulary(target.embedding.to(device), head.to(device), rows.to(device), shape.mask_token_id)


def block_of_step(step: int, settings: TrainingSettings, block: int) -> tuple[int, int]:
    """Tokens of a block, and blocks of a sequence: short blocks come first, in proportion more of them.

    All positions stand on the first ones, and the first ones learn as much from a short block as from a long one.
    """
    if step >= settings.short_share * settings.steps or settings.short_block >= block:
        return block, settings.anchors
    return settings.short_block, round(settings.anchors * block / settings.short_block)


def learning_rate(step: int, settings: TrainingSettings) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    through = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * through))
    return settings.learning_rate * (_FINAL_LEARNING_RATE + (1.0 - _FINAL_LEARNING_RATE) * cosine)


def fading(step: int, settings: TrainingSettings) -> float:
    """What is left of the loss's first helps: falls linearly from 1 to 0."""
    end = settings.steps * settings.divergence_share
    return max(0.0, 1.0 - step / end) if end else 0.0


def make_optimizers(drafter: TrainableDrafter, settings: TrainingSettings) -> tuple[torch.optim.Optimizer, ...]:
    """AdamW for all parameters, or for all but the layers' matrices and fc, which Muon takes.

    Norms, biases and the edge embedding are not decayed.
    """
    matrices, decayed, plain = [], [], []
    for name, parameter in drafter.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim != 2 or name.startswith("markov_head.markov_w1"):
            plain.append(parameter)
        elif settings.optimizer == "muon" and name.startswith(("layers", "fc")):
            matrices.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=_BETAS, fused=True)
    if not matrices:
        return (adam,)
    return adam, Muon(matrices, settings.learning_rate, weight_decay=settings.weight_decay)


def _activations(shape: DrafterConfig, settings: TrainingSettings, length: int) -> int:
    """About how many bytes a step's activations take without gradient checkpointing."""
    backbone = shape.backbone
    rows = settings.anchors * shape.block_size
    a_row = 12 * backbone.hidden_size + 4 * backbone.intermediate_size
    scores = 2 * backbone.num_attention_heads * (length + rows)
    return 4 * settings.batch * rows * backbone.num_layers * (a_row + scores)


def _count(values: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(values.numel()), device=values.device)


def _ratio(total: torch.Tensor, count: torch.Tensor) -> float | None:
    return float(total / count) if float(count) else None
