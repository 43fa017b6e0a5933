"""What fits on a device, and how fast it may be: from configurations alone, before anything is exported.

Decoding one sequence reads all weights once a token, so its speed is bounded by the memory's bandwidth. What a device
holds is weights, a cache for each sequence, the logits of a call, and what the system and the libraries take.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dspark_edge.engines.errors import CheckpointError, InvalidInputError
from dspark_edge.engines.manifest import ONNX_RUNTIME_PRECISIONS
from dspark_edge.exporter.checkpoint import open_checkpoint
from dspark_edge.exporter.configuration import (
    DecoderConfig,
    DrafterConfig,
    check_fit,
    read_decoder_config,
    read_drafter_config,
)
from dspark_edge.exporter.modules.drafter import Drafter
from dspark_edge.exporter.modules.target import Target

__all__ = ["DEVICES", "DevicePlan", "DeviceSpec", "Footprint", "PairShape", "plan_device", "read_pair_shape"]

_GB = 1_000_000_000
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A device by its data sheet."""

    memory: int  # bytes
    bandwidth: float  # bytes a second
    unified: bool  # shared with the processor and the system
    source: str

    @property
    def reserved(self) -> int:
        """Bytes that the system, CUDA and TensorRT take: rough, and more where the system lives there, too."""
        return 2 * _GIB if self.unified else _GIB


# Bandwidths are the data sheets' peaks.
DEVICES: Mapping[str, DeviceSpec] = {
    "orin-nano-8gb": DeviceSpec(8 * _GIB, 102 * _GB, True, "Jetson Orin Nano Super data sheet; 68 GB/s without Super"),
    "orin-nx-16gb": DeviceSpec(16 * _GIB, 102.4 * _GB, True, "Jetson Orin NX series data sheet"),
    "agx-orin-32gb": DeviceSpec(32 * _GIB, 204.8 * _GB, True, "Jetson AGX Orin series data sheet"),
    "agx-orin-64gb": DeviceSpec(64 * _GIB, 204.8 * _GB, True, "Jetson AGX Orin series data sheet"),
    "thor-128gb": DeviceSpec(128 * _GIB, 273 * _GB, True, "Jetson AGX Thor (T5000) data sheet"),
    "l4": DeviceSpec(24 * _GIB, 300 * _GB, False, "NVIDIA L4 data sheet"),
    "rtx-4090": DeviceSpec(24 * _GIB, 1008 * _GB, False, "GeForce RTX 4090 specifications"),
    "h100": DeviceSpec(80 * _GIB, 3350 * _GB, False, "NVIDIA H100 SXM data sheet"),
}

# Bytes of a weight: of matrices, and of embedding and head. Blocks of 32 have a scale of 4 bytes and a zero point.
_WEIGHT_BYTES: Mapping[str, tuple[float, float]] = {
    "fp32": (4.0, 4.0),
    "fp16": (2.0, 2.0),
    "bf16": (2.0, 2.0),
    "int8": (1 + 5 / 32, 1 + 5 / 32),
    "int4": (0.5 + 4.5 / 32, 1 + 5 / 32),
    "w4a16": (0.5 + 2 / 64, 2.0),  # blocks of 64 with a scale of 2 bytes
}
_CACHE_BYTES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 4, "int4": 4, "w4a16": 2}
# Of the data sheet's bandwidth, what decoding reaches where it is well done.
_REACHED = 0.7
# A verification of a block takes so many plain steps, if memory is what bounds it.
_VERIFICATION = 1.1
_BATCHES = (1, 2, 4, 8, 16)
_CONTEXTS = (2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True, slots=True)
class PairShape:
    """A target and its drafter by their configurations."""

    target: DecoderConfig
    drafter: DrafterConfig | None
    target_weights: int  # without embedding and head, with the projection of the drafter's context
    drafter_weights: int  # without embedding and head, with the sequential head
    vocabulary_weights: int  # the target's embedding and head, and a head's rows that the drafter has for itself
    repeated_weights: int  # what the drafter's graph has of the target's embedding and head

    @property
    def read_vocabulary_weights(self) -> int:
        """Of them, what a plain step reads: the target's head."""
        return self.target.vocab_size * self.target.hidden_size

    @property
    def block_size(self) -> int:
        return self.drafter.block_size if self.drafter else 0


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on a device."""

    weights: int
    cache_per_token: int  # of one sequence
    logits_per_sequence: int

    def total(self, batch: int, context: int) -> int:
        """With so many sequences of so many cached tokens each."""
        return self.weights + batch * (context * self.cache_per_token + self.logits_per_sequence)


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What fits, and how fast it may be."""

    device: str
    precision: str
    footprint: Footprint
    free: int  # bytes for weights, caches and logits
    longest: Mapping[int, int]  # batch → cached tokens of each sequence that fit, at most what the target was made for
    largest: Mapping[int, int]  # context → sequences that fit
    plain_tokens_per_second: float  # one sequence, half of the context cached; a bound by bandwidth
    speculative_tokens_per_second: float | None  # the same with a drafter of the accepted length that was given

    @property
    def fits(self) -> bool:
        """Whether one sequence does, of a block at least."""
        return self.longest[1] > 0

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "precision": self.precision,
            "fits": self.fits,
            "free_bytes": self.free,
            "weights_bytes": self.footprint.weights,
            "cache_bytes_per_token": self.footprint.cache_per_token,
            "logits_bytes_per_sequence": self.footprint.logits_per_sequence,
            "longest_context": {str(batch): tokens for batch, tokens in self.longest.items()},
            "largest_batch": {str(context): batch for context, batch in self.largest.items()},
            "plain_tokens_per_second": self.plain_tokens_per_second,
            "speculative_tokens_per_second": self.speculative_tokens_per_second,
        }


def read_pair_shape(target: str | Path, drafter: str | Path | None) -> PairShape:
    """Read configurations.

    Args:
        target: a folder with a `config.json` (weights need not be there), such a file, a GGUF file, or a Hugging Face
            name.
        drafter: the same; None: prompt lookup, which has no weights.

    Raises:
        CheckpointError: a configuration is missing, damaged or unsupported (MismatchError: they do not fit).
    """
    config = read_decoder_config(_config(target), str(target))
    drafted = None if drafter is None else read_drafter_config(_config(drafter), str(drafter))
    if drafted is not None:
        check_fit(config, drafted)
    with torch.device("meta"):
        module = Target(config, drafted, 1, torch.float32)
        own = _weights(module)
        vocabulary = config.vocab_size * config.hidden_size
        copies = 1 if config.tie_word_embeddings else 2
        drafting, own_head, repeated = 0, 0, 0
        if drafted is not None:
            draft_module = Drafter(drafted, 1, 1, None, torch.float32)
            # Its graph has the target's embedding, and the head or its rows of the tokens that are drafted.
            head = drafted.head_size * config.hidden_size
            drafting = _weights(draft_module) - vocabulary - head
            own_head, repeated = (0, vocabulary + head) if head == vocabulary else (head, vocabulary)
    return PairShape(config, drafted, own - copies * vocabulary, drafting, copies * vocabulary + own_head, repeated)


def plan_device(
    pair: PairShape, device: str, precision: str = "fp16", spec: DeviceSpec | None = None, tau: float | None = None
) -> DevicePlan:
    """What fits on a device.

    Args:
        pair: target and drafter.
        device: one of `DEVICES`, or the name of `spec`.
        precision: of the bundle.
        spec: of a device that is not among them.
        tau: tokens that a round commits, for an estimate with the drafter.

    Raises:
        InvalidInputError: device or precision is unknown, or tau is below 1.
    """
    if spec is None and device not in DEVICES:
        raise InvalidInputError(f"unknown device {device!r}; choose one of: {', '.join(DEVICES)}, or give its memory")
    if precision not in _WEIGHT_BYTES:
        raise InvalidInputError(f"unknown precision {precision!r}; choose one of: {', '.join(_WEIGHT_BYTES)}")
    if tau is not None and tau < 1:
        raise InvalidInputError(f"tau is {tau}, expected at least 1, the token that a round always commits")
    spec = spec or DEVICES[device]
    footprint = _footprint(pair, precision)
    free = max(0, spec.memory - spec.reserved)
    most = pair.target.max_position_embeddings
    longest = {batch: _longest(footprint, free, batch, most, 1 + pair.block_size) for batch in _BATCHES}
    largest = {context: _largest(footprint, free, context) for context in _CONTEXTS if context <= most}
    return DevicePlan(
        device,
        precision,
        footprint,
        free,
        longest,
        largest,
        *_speeds(pair, precision, footprint, spec, longest[1], tau),
    )


def _weights(module: nn.Module) -> int:
    """Parameters, but for the tables of angles."""
    return sum(parameter.numel() for name, parameter in module.named_parameters() if ".rotary." not in f".{name}")


def _footprint(pair: PairShape, precision: str) -> Footprint:
    matrix, vocabulary = _WEIGHT_BYTES[precision]
    stacks = [pair.target, *([pair.drafter.backbone] if pair.drafter else [])]
    # TensorRT's engines read one copy of these; ONNX Runtime's sessions have their own.
    repeated = pair.repeated_weights if precision in ONNX_RUNTIME_PRECISIONS else 0
    elements = sum(2 * stack.num_layers * stack.key_value_size for stack in stacks)
    return Footprint(
        round(
            (pair.target_weights + pair.drafter_weights) * matrix + (pair.vocabulary_weights + repeated) * vocabulary
        ),
        elements * _CACHE_BYTES[precision],
        4 * (1 + pair.block_size) * pair.target.vocab_size,
    )


def _longest(footprint: Footprint, free: int, batch: int, most: int, least: int) -> int:
    room = (free - footprint.total(batch, 0)) // (batch * footprint.cache_per_token)
    return min(most, room) if room >= least else 0


def _largest(footprint: Footprint, free: int, context: int) -> int:
    each = context * footprint.cache_per_token + footprint.logits_per_sequence
    return max(0, (free - footprint.weights) // each)


def _speeds(
    pair: PairShape, precision: str, footprint: Footprint, spec: DeviceSpec, longest: int, tau: float | None
) -> tuple[float, float | None]:
    matrix, vocabulary = _WEIGHT_BYTES[precision]
    cached = min(longest, _CONTEXTS[1]) / 2 * footprint.cache_per_token
    head = pair.read_vocabulary_weights * vocabulary
    plain_s = (pair.target_weights * matrix + head + cached) / (_REACHED * spec.bandwidth)
    if tau is None or pair.drafter is None:
        return 1 / plain_s, None
    drafted = pair.drafter.head_size * pair.target.hidden_size * vocabulary
    draft_s = (pair.drafter_weights * matrix + drafted) / (_REACHED * spec.bandwidth)
    return 1 / plain_s, tau / (_VERIFICATION * plain_s + draft_s)


def _config(source: str | Path) -> Mapping[str, Any]:
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path if path.suffix == ".json" else None
    if file is None:
        with ExitStack() as stack:
            return dict(stack.enter_context(open_checkpoint(source)).config)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{source}: there is no config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return found
