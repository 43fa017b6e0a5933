"""Checkpoints of a training run, and the drafter that comes out of it.

A checkpoint is one safetensors file (no pickle), written beside the old one and renamed over it. What is random in a
run is a function of its seed and the step, so parameters, optimizer moments and the step are all that a run needs to
go on bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dspark_edge.engines.errors import CheckpointError, InvalidInputError
from dspark_edge.trainer.target_model import TargetModel
from dspark_edge.trainer.training.drafter_model import TrainableDrafter
from dspark_edge.trainer.training.replacing_path import replacing_path

__all__ = ["TrainingState", "load_state", "save_drafter", "save_state"]


@dataclass(frozen=True, slots=True)
class TrainingState:
    """Where a run stands."""

    step: int
    run: str  # identifies data and settings
    tensors: Mapping[str, torch.Tensor]


def _write(tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Replace a file in one step; see `replacing_path`."""
    with replacing_path(path) as temporary:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata))
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(str(error)) from error


def save_state(
    path: Path, drafter: TrainableDrafter, optimizers: Sequence[torch.optim.Optimizer], step: int, run: str
) -> None:
    """Write a checkpoint of parameters, optimizer moments and the step."""
    tensors = {f"parameters.{name}": value.detach().cpu() for name, value in drafter.named_parameters()}
    tensors["feature_scale"] = drafter.feature_scale.cpu()
    for name, parameter in drafter.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).detach().cpu()
    _write(tensors, path, {"step": str(step), "run": run})


def load_state(path: Path, run: str) -> TrainingState | None:
    """The checkpoint of a run, or None where there is none.

    Raises:
        InvalidInputError: the checkpoint is of another run.
        CheckpointError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 — no mapping
        state = TrainingState(int(metadata["step"]), metadata["run"], tensors)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; remove it to begin anew") from None
    if state.run != run:
        raise InvalidInputError(
            f"{path.parent} holds a run on other responses, with another target or other settings; give another "
            "output, or --overwrite"
        )
    return state


@torch.no_grad()
def restore(state: TrainingState, drafter: TrainableDrafter, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Put a checkpoint back."""
    drafter.feature_scale.copy_(state.tensors["feature_scale"])
    for name, parameter in drafter.named_parameters():
        parameter.copy_(state.tensors[f"parameters.{name}"])
    loaded: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}
    named = dict(drafter.named_parameters())
    for key, tensor in state.tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            field, _, name = rest.partition(".")
            parameter = named[name]
            on = "cpu" if field == "step" else parameter.device
            loaded.setdefault(parameter, {})[field] = tensor.to(on)
    for optimizer in optimizers:
        own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        optimizer.state.update({parameter: loaded[parameter] for parameter in own if parameter in loaded})


def drafter_config_json(drafter: TrainableDrafter, target_config: Mapping[str, Any], anchors: int) -> dict[str, Any]:
    """config.json in DeepSpec's form: the target's, with the drafter's members over it."""
    config = drafter.config
    backbone = config.backbone
    kept = ("vocab_size", "hidden_act", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {
        **{key: target_config[key] for key in (*kept, *tokens) if key in target_config},
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "attention_bias": backbone.attention_bias,
        "hidden_size": backbone.hidden_size,
        "intermediate_size": backbone.intermediate_size,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_attention_heads,
        "num_key_value_heads": backbone.num_key_value_heads,
        "head_dim": backbone.head_dim,
        "rms_norm_eps": backbone.rms_norm_eps,
        "layer_types": ["full_attention"] * backbone.num_layers,
        "tie_word_embeddings": False,
        "num_target_layers": config.num_target_layers,
        "target_layer_ids": list(config.tap_layers),
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head if config.markov_rank else "vanilla",
        "enable_confidence_head": config.confidence,
        "confidence_head_with_markov": config.confidence_with_markov,
        "num_anchors": anchors,
        **({"draft_vocab_size": config.draft_vocab_size} if config.draft_vocab_size else {}),
        **({"confidence_head_with_draft_probs": True} if config.confidence_with_draft_probs else {}),
    }


def save_drafter(
    folder: Path,
    drafter: TrainableDrafter,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    vocabulary: np.ndarray | None,
    copies_of: TargetModel | None = None,
) -> None:
    """Write a drafter in DeepSpec's checkpoint format.

    Args:
        folder: made if it is not there.
        drafter: trained.
        config: its config.json.
        dtype: of the tensors on disk.
        vocabulary: [P] ids of the draft vocabulary, where it has one.
        copies_of: also write copies of this target's embedding and head, for loaders that want them.
    """
    tensors = {name: value.to("cpu", dtype) for name, value in drafter.checkpoint_tensors().items()}
    if vocabulary is not None:
        tensors["draft_vocab_ids"] = torch.from_numpy(vocabulary)
    if copies_of is not None:
        tensors["embed_tokens.weight"] = copies_of.embedding.detach().to("cpu", dtype)
        tensors["lm_head.weight"] = copies_of.head.detach().to("cpu", dtype).clone()
    _write(tensors, folder / "model.safetensors", {"format": "pt"})
    text = json.dumps({**config, "dtype": str(dtype).removeprefix("torch.")}, indent=2, sort_keys=True) + "\n"
    write_text(folder / "config.json", text)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step.

    Raises:
        InvalidInputError: it cannot be written.
    """
    with replacing_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
