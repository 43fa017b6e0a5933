"""What a checkpoint's `config.json` says, in one form for both of Hugging Face's dialects.

Older files write `rope_theta`, `rope_scaling` and `torch_dtype`; newer ones `rope_parameters` and `dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dspark_edge.engines.errors import CheckpointError, MismatchError

__all__ = [
    "EMBEDDING_TAP",
    "DecoderConfig",
    "DrafterConfig",
    "RotaryConfig",
    "check_fit",
    "read_decoder_config",
    "read_drafter_config",
    "read_eos_token_ids",
    "read_stored_dtype",
]

EMBEDDING_TAP = -1
"""The tap that stands for the embedding output instead of a layer's."""

_TARGETS = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
_DRAFTERS = {"Qwen3DSparkModel": "qwen3"}
_HEADS = ("vanilla", "gated", "rnn")
_ROTARY_TYPES = ("default", "linear", "llama3", "factors")


@dataclass(frozen=True, slots=True)
class RotaryConfig:
    """Rotary position embedding: base, and how the frequencies are scaled."""

    theta: float
    type: str = "default"  # default | linear | llama3 | factors
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()  # divisors of the D/2 frequencies, as GGUF stores Llama-3 scaling


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """A stack of decoder layers: a target, or the backbone of a drafter."""

    family: str  # llama | qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rotary: RotaryConfig
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    bos_token_id: int | None

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normed per head before rotation."""
        return self.family == "qwen3"


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """A DSpark drafter in DeepSpec's checkpoint format (DFlash is the one with `markov_rank` 0)."""

    backbone: DecoderConfig
    num_target_layers: int
    block_size: int
    mask_token_id: int
    tap_layers: tuple[int, ...]
    markov_rank: int
    markov_head: str  # vanilla | gated | rnn | none
    confidence: bool
    confidence_with_markov: bool
    draft_vocab_size: int | None = None  # P, the tokens that it drafts; None: all of the vocabulary
    confidence_with_draft_probs: bool = False  # whether the confidence head sees how sure the draft's distribution is

    @property
    def head_size(self) -> int:
        """Tokens that can be drafted: rows of the head and of the Markov bias, P or V."""
        return self.backbone.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size


class _Reader:
    """Typed access to a JSON object, with errors that name the file and the key."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key)
        value = default if value is None else value  # some files write null for what they leave to the default
        if value is None:
            raise CheckpointError(f"{self.source}: config.json has no {key!r}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"{self.source}: {key!r} in config.json is {value!r}, expected a number")
        return float(value)

    def count(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.number(key, default)
        if value != int(value) or value < minimum:
            raise CheckpointError(
                f"{self.source}: {key!r} in config.json is {value:g}, expected a whole number ≥ {minimum}"
            )
        return int(value)

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if value <= 0:
            raise CheckpointError(f"{self.source}: {key!r} in config.json is {value:g}, expected more than 0")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.source}: {key!r} in config.json is {value!r}, expected true or false")
        return value

    def mapping(self, key: str) -> Mapping[str, Any]:
        value = self.values.get(key) or {}
        if not isinstance(value, Mapping):
            raise CheckpointError(f"{self.source}: {key!r} in config.json is {value!r}, expected an object")
        return value

    def architecture(self, known: Mapping[str, str], what: str) -> str:
        named = self.values.get("architectures")
        name = named[0] if isinstance(named, list) and named else named
        if not isinstance(name, str) or name not in known:
            raise CheckpointError(
                f"{self.source}: {name!r} is no supported {what} architecture; supported: {', '.join(known)}"
            )
        return known[name]


def _read_rotary(reader: _Reader) -> RotaryConfig:
    parameters = dict(reader.mapping("rope_scaling"))
    parameters.update(reader.mapping("rope_parameters"))
    inner = _Reader(parameters, f"{reader.source} (rope)")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _ROTARY_TYPES:
        raise CheckpointError(
            f"{reader.source}: rope scaling {kind!r} is not supported; supported: {', '.join(_ROTARY_TYPES)}"
        )
    theta = inner.positive("rope_theta", reader.positive("rope_theta", 10000.0))
    if kind == "llama3":
        low, high = inner.positive("low_freq_factor"), inner.positive("high_freq_factor")
        if high <= low:
            raise CheckpointError(
                f"{inner.source}: 'high_freq_factor' in config.json is {high:g}, expected more than "
                f"'low_freq_factor', {low:g}"
            )
        context = inner.count("original_max_position_embeddings")
        return RotaryConfig(theta, kind, inner.positive("factor"), low, high, context)
    if kind == "linear":
        return RotaryConfig(theta, kind, inner.positive("factor"))
    if kind == "factors":
        return RotaryConfig(theta, kind, factors=tuple(float(x) for x in parameters.get("factors", ())))
    return RotaryConfig(theta)


def _reject_unsupported(reader: _Reader) -> None:
    activation = reader.values.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"{reader.source}: activation {activation!r} is not supported; supported: silu")
    layer_types = reader.values.get("layer_types") or []
    if reader.flag("use_sliding_window") or any(kind != "full_attention" for kind in layer_types):
        raise CheckpointError(f"{reader.source}: sliding-window attention is not supported; supported: full attention")
    if reader.values.get("quantization_config"):
        raise CheckpointError(
            f"{reader.source}: the checkpoint is quantized; give the fp32, fp16 or bf16 original, or a GGUF file"
        )
    if reader.number("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError(f"{reader.source}: partial rotary embedding is not supported")


def _read_backbone(reader: _Reader, family: str) -> DecoderConfig:
    _reject_unsupported(reader)
    hidden, heads = reader.count("hidden_size"), reader.count("num_attention_heads")
    key_value_heads = reader.count("num_key_value_heads", heads)
    if heads % key_value_heads:
        raise CheckpointError(
            f"{reader.source}: {heads} attention heads cannot share {key_value_heads} key/value heads evenly"
        )
    head_dim = reader.count("head_dim", hidden // heads)
    if head_dim % 2:
        raise CheckpointError(f"{reader.source}: head_dim is {head_dim}; rotary embedding needs an even number")
    rotary = _read_rotary(reader)
    if rotary.type == "factors" and len(rotary.factors) != head_dim // 2:
        raise CheckpointError(
            f"{reader.source}: {len(rotary.factors)} rope factors for head size {head_dim}, expected {head_dim // 2}"
        )
    bos = reader.values.get("bos_token_id")
    return DecoderConfig(
        family=family,
        vocab_size=reader.count("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.count("intermediate_size"),
        num_layers=reader.count("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        max_position_embeddings=reader.count("max_position_embeddings", 2048),
        rotary=rotary,
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        attention_bias=reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
        bos_token_id=bos if isinstance(bos, int) else None,
    )


def read_decoder_config(config: Mapping[str, Any], source: str) -> DecoderConfig:
    """Read a target's configuration.

    Raises:
        CheckpointError: the architecture or an option of it is unknown, or a value is missing or malformed.
    """
    reader = _Reader(config, source)
    return _read_backbone(reader, reader.architecture(_TARGETS, "target"))


def _read_draft_vocab_size(reader: _Reader, vocab_size: int) -> int | None:
    if reader.values.get("draft_vocab_size") is None:
        return None
    size = reader.count("draft_vocab_size")
    if size > vocab_size:
        raise CheckpointError(
            f"{reader.source}: 'draft_vocab_size' in config.json is {size}, more than the vocabulary of {vocab_size}"
        )
    return None if size == vocab_size else size


def read_drafter_config(config: Mapping[str, Any], source: str) -> DrafterConfig:
    """Read a drafter's configuration (DeepSpec format, and as additions to it `draft_vocab_size` and
    `confidence_head_with_draft_probs`).

    Raises:
        CheckpointError: the architecture or an option of it is unknown, or a value is missing or malformed.
    """
    reader = _Reader(config, source)
    backbone = _read_backbone(reader, reader.architecture(_DRAFTERS, "drafter"))
    taps = config.get("target_layer_ids")
    if not isinstance(taps, list) or not taps or not all(type(tap) is int for tap in taps):
        raise CheckpointError(f"{source}: 'target_layer_ids' in config.json is {taps!r}, expected a list of layers")
    if len(set(taps)) < len(taps):
        raise CheckpointError(f"{source}: 'target_layer_ids' in config.json is {taps}, expected distinct layers")
    rank = reader.count("markov_rank", 0, minimum=0)
    head = config.get("markov_head_type", "vanilla") if rank else "none"
    if rank and head not in _HEADS:
        raise CheckpointError(f"{source}: Markov head {head!r} is not supported; supported: {', '.join(_HEADS)}")
    confidence = reader.flag("enable_confidence_head")
    with_markov = confidence and reader.flag("confidence_head_with_markov")
    if with_markov and not rank:
        raise CheckpointError(f"{source}: confidence_head_with_markov needs a markov_rank above 0")
    mask_token = reader.count("mask_token_id", minimum=0)
    if mask_token >= backbone.vocab_size:
        raise CheckpointError(
            f"{source}: mask_token_id {mask_token} is outside the vocabulary of {backbone.vocab_size}"
        )
    return DrafterConfig(
        backbone=backbone,
        num_target_layers=reader.count("num_target_layers"),
        block_size=reader.count("block_size"),
        mask_token_id=mask_token,
        tap_layers=tuple(taps),
        markov_rank=rank,
        markov_head=str(head),
        confidence=confidence,
        confidence_with_markov=with_markov,
        draft_vocab_size=_read_draft_vocab_size(reader, backbone.vocab_size),
        confidence_with_draft_probs=confidence and reader.flag("confidence_head_with_draft_probs"),
    )


def check_fit(target: DecoderConfig, drafter: DrafterConfig) -> None:
    """Check by their configurations that a drafter was made for a target.

    Raises:
        MismatchError: vocabulary, hidden size, number of layers or taps do not fit.
    """
    pairs = (
        ("vocabulary size", drafter.backbone.vocab_size, target.vocab_size),
        ("hidden size", drafter.backbone.hidden_size, target.hidden_size),
        ("number of target layers", drafter.num_target_layers, target.num_layers),
    )
    for what, given, expected in pairs:
        if given != expected:
            raise MismatchError(
                f"drafter and target do not fit: the drafter was made for {what} {given}, the target has {expected}; "
                "use the target the drafter was trained for"
            )
    # The last layer's output is what the final norm and head turn into the next token: a drafter that taps it was
    # made with other conventions (an off-by-one), and would quietly draft badly.
    last = target.num_layers - 2
    for tap in drafter.tap_layers:
        if not EMBEDDING_TAP <= tap <= last:
            raise MismatchError(
                f"drafter taps target layer {tap}; taps go from {EMBEDDING_TAP} (the embedding) to {last}, "
                f"the last layer ({target.num_layers - 1}) cannot be tapped"
            )


def read_eos_token_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """End-of-text ids in ascending order; the generation configuration's word counts before the model's."""
    value = generation_config.get("eos_token_id")
    if value is None:
        value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return tuple(sorted({token for token in ids if type(token) is int}))


def read_stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The type that the checkpoint says its weights have, for example "bfloat16"."""
    value = config.get("dtype", config.get("torch_dtype"))
    return value if isinstance(value, str) else None
