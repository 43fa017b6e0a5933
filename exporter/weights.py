"""Where each parameter of a tracing module comes from, so that weights can stream from checkpoint to bundle.

A `WeightSource` is a recipe: it reads, joins and transposes checkpoint tensors when asked and keeps nothing. The same
recipes fill a torch module (`load_module`, for parity) and the bundle's data files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import nn

from dspark_edge.engines.errors import CheckpointError, MismatchError
from dspark_edge.exporter.checkpoint import Checkpoint
from dspark_edge.exporter.configuration import DecoderConfig, DrafterConfig, RotaryConfig
from dspark_edge.exporter.stored_blocks import BlockForm, StoredBlocks

__all__ = [
    "RowsSource",
    "Source",
    "WeightSource",
    "check_shared_weights",
    "drafter_sources",
    "load_module",
    "read_draft_vocab_ids",
    "rotary_tables",
    "target_sources",
]

_DRAFT_VOCAB_IDS = "draft_vocab_ids"


class Source(Protocol):
    """A recipe for one parameter. Equal sources give equal parameters, and share their bytes on disk."""

    def __hash__(self) -> int: ...

    def load(self, dtype: torch.dtype) -> torch.Tensor:
        """The parameter, made now. Raises `CheckpointError` when it cannot be read."""

    def shape(self) -> tuple[int, ...]:
        """The parameter's shape, without making it."""


@dataclass(frozen=True)
class WeightSource:
    """A recipe for one parameter: tensors joined along their first dimension, then transposed if asked."""

    checkpoint: Checkpoint = field(compare=False, repr=False)
    names: tuple[str, ...]
    transpose: bool = False
    origin: str = ""  # tells checkpoints apart where sources are compared: equal sources share their bytes on disk

    def load(self, dtype: torch.dtype) -> torch.Tensor:
        """Read the parameter in the given type.

        Raises:
            CheckpointError: a tensor is missing or cannot be read.
        """
        parts = [self.checkpoint.tensor(name).to(dtype) for name in self.names]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.t().contiguous() if self.transpose else joined.contiguous()

    def shape(self) -> tuple[int, ...]:
        """The parameter's shape, from the checkpoint's headers alone."""
        shapes = [self.checkpoint.shape(name) for name in self.names]
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise CheckpointError(f"{self.checkpoint.source}: {', '.join(self.names)} differ in shape: {shapes}")
        joined = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return joined[::-1] if self.transpose else joined

    def pieces(self) -> tuple[WeightSource, ...]:
        """The tensors one by one, each as the checkpoint has it."""
        return tuple(replace(self, names=(name,), transpose=False) for name in self.names)

    def block_form(self) -> BlockForm | None:
        """What blocks the checkpoint has it in; None where in none, or where it is joined of several tensors."""
        return self.checkpoint.block_form(self.names[0]) if len(self.names) == 1 else None

    def blocks(self) -> StoredBlocks:
        """The matrix as the checkpoint has it, where it has a `block_form`. Raises `CheckpointError`."""
        return self.checkpoint.blocks(self.names[0])


@dataclass(frozen=True)
class RowsSource:
    """A recipe for some rows of a matrix."""

    matrix: WeightSource  # of one tensor, as the checkpoint has it
    what: str  # which rows: equal sources share their bytes on disk
    count: int
    read_index: Callable[[], torch.Tensor] = field(compare=False, repr=False)  # [count] int64

    def load(self, dtype: torch.dtype) -> torch.Tensor:
        # Taken before they are converted: safetensors maps the matrix, and its other rows are not read.
        rows = self.matrix.checkpoint.tensor(self.matrix.names[0])[self.read_index()]
        return rows.to(dtype).contiguous()

    def shape(self) -> tuple[int, ...]:
        return (self.count, *self.matrix.shape()[1:])

    def pieces(self) -> tuple[RowsSource, ...]:
        return (self,)

    def block_form(self) -> BlockForm | None:
        return self.matrix.block_form()

    def blocks(self) -> StoredBlocks:
        return self.matrix.blocks().rows(self.read_index().numpy())


@dataclass(frozen=True)
class ComputedSource:
    """A parameter that is computed, such as a rotary table; `key` identifies it among equals."""

    key: str
    compute: Callable[[], torch.Tensor] = field(compare=False, repr=False)
    size: tuple[int, ...] = ()

    def load(self, dtype: torch.dtype) -> torch.Tensor:
        return self.compute().to(dtype).contiguous()

    def shape(self) -> tuple[int, ...]:
        return self.size


def _inverse_frequencies(rotary: RotaryConfig, head_dim: int) -> torch.Tensor:
    """[D/2] fp64 rotary frequencies; "llama3" scales long wavelengths down and blends in between (Llama 3.1)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = rotary.theta**-exponents
    if rotary.type == "linear":
        return frequencies / rotary.factor
    if rotary.type == "factors":
        return frequencies / torch.tensor(rotary.factors, dtype=torch.float64)
    if rotary.type == "llama3":
        wavelengths = 2 * math.pi / frequencies
        context = rotary.original_max_position_embeddings
        low, high = rotary.low_freq_factor, rotary.high_freq_factor
        blend = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
        return frequencies * (blend + (1 - blend) / rotary.factor)
    return frequencies


def rotary_tables(config: DecoderConfig, positions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [P, D/2] fp32.

    The angles are taken in fp32, as the models were trained: Hugging Face multiplies fp32 positions and frequencies.
    """
    frequencies = _inverse_frequencies(config.rotary, config.head_dim).float()
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _rotary_sources(prefix: str, config: DecoderConfig, positions: int) -> Iterator[tuple[str, Source]]:
    shape = (positions, config.head_dim // 2)
    for index, name in enumerate(("cos", "sin")):
        key = f"rotary {name} {config.rotary} {config.head_dim} {positions}"
        yield f"{prefix}.{name}", ComputedSource(key, lambda i=index: rotary_tables(config, positions)[i], shape)


class _Recipes:
    """Collects sources of one checkpoint under one prefix."""

    def __init__(self, checkpoint: Checkpoint, origin: str, prefix: str) -> None:
        self.checkpoint, self.origin, self.prefix = checkpoint, origin, prefix
        self.sources: dict[str, Source] = {}

    def take(self, parameter: str, *names: str, transpose: bool = False) -> None:
        full = tuple(self.prefix + name for name in names)
        self.sources[parameter] = WeightSource(self.checkpoint, full, transpose, self.origin)

    def project(self, parameter: str, *names: str, bias: bool = False) -> None:
        self.take(f"{parameter}.weight", *(f"{name}.weight" for name in names), transpose=True)
        if bias:
            self.take(f"{parameter}.bias", *(f"{name}.bias" for name in names))

    def layers(self, config: DecoderConfig) -> None:
        for index in range(config.num_layers):
            layer = f"layers.{index}"
            attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                self.take(f"{layer}.{norm}.weight", f"{layer}.{norm}.weight")
            parts = [f"{attention}.{part}_proj" for part in "qkv"]
            self.project(f"{attention}.qkv_proj", *parts, bias=config.attention_bias)
            self.project(f"{attention}.o_proj", f"{attention}.o_proj", bias=config.attention_bias)
            if config.qk_norm:
                for norm in ("q_norm", "k_norm"):
                    self.take(f"{attention}.{norm}.weight", f"{attention}.{norm}.weight")
            gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
            self.project(f"{mlp}.gate_up_proj", *gate_up, bias=config.mlp_bias)
            self.project(f"{mlp}.down_proj", f"{mlp}.down_proj", bias=config.mlp_bias)
        self.take("norm.weight", "norm.weight")


def target_sources(
    target: Checkpoint,
    config: DecoderConfig,
    drafter: Checkpoint | None,
    drafter_config: DrafterConfig | None,
    positions: int,
) -> dict[str, Source]:
    """Sources of `modules.target.Target`'s parameters, by parameter name."""
    recipes = _Recipes(target, "target", "model.")
    recipes.take("embed_tokens.weight", "embed_tokens.weight")
    recipes.layers(config)
    sources = recipes.sources
    sources.update(_rotary_sources("rotary", config, positions))
    if not config.tie_word_embeddings:
        sources["lm_head.weight"] = WeightSource(target, ("lm_head.weight",), False, "target")
    if drafter is not None and drafter_config is not None:
        context = _Recipes(drafter, "drafter", "")
        backbone = drafter_config.backbone
        context.project("context.fc", "fc")
        context.take("context.hidden_norm.weight", "hidden_norm.weight")
        pairs = [f"layers.{i}.self_attn.{part}_proj" for i in range(backbone.num_layers) for part in "kv"]
        context.project("context.kv_proj", *pairs, bias=backbone.attention_bias)
        for index in range(backbone.num_layers):
            context.take(f"context.k_norm.{index}.weight", f"layers.{index}.self_attn.k_norm.weight")
        sources.update(context.sources)
        sources.update(_rotary_sources("context.rotary", backbone, positions))
    return sources


def _vocabulary_sources(target: Checkpoint, config: DecoderConfig) -> tuple[WeightSource, WeightSource]:
    """The target's embedding and head, which the drafter shares."""
    embedding = WeightSource(target, ("model.embed_tokens.weight",), False, "target")
    if config.tie_word_embeddings:
        return embedding, embedding
    return embedding, WeightSource(target, ("lm_head.weight",), False, "target")


def read_draft_vocab_ids(drafter: Checkpoint, config: DrafterConfig) -> torch.Tensor:
    """The target's ids of the tokens that a drafter with a draft vocabulary drafts, [P] int64, ascending.

    Raises:
        CheckpointError: they are missing, of another type or shape, out of range, or not strictly increasing.
    """
    given, wanted = list(drafter.shape(_DRAFT_VOCAB_IDS)), [config.draft_vocab_size]
    if given != wanted:
        raise CheckpointError(f"{drafter.source}: {_DRAFT_VOCAB_IDS} has shape {given}, config.json asks for {wanted}")
    ids = drafter.integers(_DRAFT_VOCAB_IDS)
    vocabulary = config.backbone.vocab_size
    outside = ids[(ids < 0) | (ids >= vocabulary)]
    if len(outside):
        raise CheckpointError(
            f"{drafter.source}: {_DRAFT_VOCAB_IDS} holds {int(outside[0])}, outside the vocabulary of {vocabulary}"
        )
    falling = (ids[1:] <= ids[:-1]).nonzero()
    if len(falling):
        row = int(falling[0])
        raise CheckpointError(
            f"{drafter.source}: {_DRAFT_VOCAB_IDS} is not strictly increasing: {int(ids[row + 1])} follows "
            f"{int(ids[row])} in row {row + 1}"
        )
    return ids


def _draft_vocabulary_sources(
    head: WeightSource, drafter: Checkpoint, config: DrafterConfig
) -> Iterator[tuple[str, Source]]:
    """The table of a draft vocabulary, and the rows of the target's head that it names."""

    def read_ids() -> torch.Tensor:
        return read_draft_vocab_ids(drafter, config)

    size = config.head_size
    yield "draft_vocabulary.ids", ComputedSource("draft vocabulary ids", read_ids, (size,))
    yield "lm_head.weight", RowsSource(head, "draft vocabulary", size, read_ids)


def drafter_sources(
    target: Checkpoint, config: DecoderConfig, drafter: Checkpoint, drafter_config: DrafterConfig, positions: int
) -> dict[str, Source]:
    """Sources of `modules.drafter.Drafter`'s parameters; embedding and head are the target's own.

    With a draft vocabulary, the head is a copy of the rows of the target's that it names.
    """
    recipes = _Recipes(drafter, "drafter", "")
    recipes.layers(drafter_config.backbone)
    if drafter_config.markov_rank:
        for name in ("markov_head.markov_w1", "markov_head.markov_w2"):
            recipes.take(f"{name}.weight", f"{name}.weight")
        extra = {"gated": "markov_head.gate_proj", "rnn": "markov_head.joint_proj"}.get(drafter_config.markov_head)
        if extra:
            recipes.project(extra, extra, bias=True)
    if drafter_config.confidence:
        recipes.project("confidence_head", "confidence_head.proj", bias=True)
    sources = recipes.sources
    sources["embed_tokens.weight"], head = _vocabulary_sources(target, config)
    sources["lm_head.weight"] = head
    if drafter_config.draft_vocab_size is not None:
        sources.update(_draft_vocabulary_sources(head, drafter, drafter_config))
    sources.update(_rotary_sources("rotary", drafter_config.backbone, positions))
    return sources


def check_shapes(module: nn.Module, sources: Mapping[str, Source], what: str) -> None:
    """Check, by headers alone, that every parameter has a source of its shape.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the configuration says.
    """
    for name, parameter in module.named_parameters():
        source = sources[name]
        given, wanted = list(source.shape()), list(parameter.shape)
        if given != wanted:
            names = name
            if isinstance(source, WeightSource):
                names = " + ".join(source.names)
                if source.transpose:  # as the checkpoint has it
                    given, wanted = given[::-1], wanted[::-1]
            raise CheckpointError(f"{what}: {names} has shape {given}, config.json asks for {wanted}")


def check_shared_weights(target: Checkpoint, config: DecoderConfig, drafter: Checkpoint) -> None:
    """Check that the drafter's copies of embedding and head, where it brings any, are the target's.

    Copies in another float type may differ by its rounding.

    Raises:
        MismatchError: they differ: the drafter was trained for another target.
    """
    present = drafter.names()
    for name, source in zip(
        ("embed_tokens.weight", "lm_head.weight"), _vocabulary_sources(target, config), strict=True
    ):
        if name not in present:
            continue
        if drafter.shape(name) != source.shape():
            raise MismatchError(
                f"drafter and target do not fit: {name} is {list(drafter.shape(name))} in the drafter, "
                f"{list(source.shape())} in the target"
            )
        copy, own = drafter.tensor(name), target.tensor(source.names[0])
        relative = 0.0 if copy.dtype == own.dtype else 2.0**-7
        differing = 0
        for start in range(0, copy.shape[0], 4096):  # in pieces: a vocabulary matrix can be gigabytes in fp32
            rows = slice(start, start + 4096)
            ours, theirs = copy[rows].float(), own[rows].float()
            # Asked this way round, a NaN counts as a difference.
            same = (ours - theirs).abs() <= relative * theirs.abs() + relative * 1e-3
            differing += int((~same).any(dim=1).sum())
        if differing:
            raise MismatchError(
                f"drafter and target do not fit: {name} differs in {differing} of {copy.shape[0]} rows; "
                "the drafter was trained for another target, or the target was fine-tuned or quantized since"
            )


def load_module(module: nn.Module, sources: Mapping[str, Source]) -> nn.Module:
    """Fill a module built on the meta device with its weights, in the types it declares."""
    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(sources[name].load(parameter.dtype))
    return module.eval()
