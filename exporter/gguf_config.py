"""The metadata of a GGUF file, and the Hugging Face configuration written from it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dspark_edge.engines.errors import CheckpointError

__all__ = ["ARCHITECTURES", "Metadata", "hugging_face_config", "rope_parameters"]

# GGUF's architecture -> Hugging Face's class
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# llama.cpp's default when a file does not say.
_DEFAULT_ROPE_THETA = 10000.0
# What every Llama 3.1 to 3.3 has; a GGUF file keeps only the factors that follow from them.
_LLAMA3_LOW_FREQ_FACTOR = 1.0
_LLAMA3_HIGH_FREQ_FACTOR = 4.0
_LLAMA3_ORIGINAL_LENGTH = 8192
# The names of `{arch}.rope.scaling.*` in Hugging Face's rope_parameters, where they differ.
_SCALING_NAMES = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


@dataclass(frozen=True, slots=True)
class Metadata:
    """The key-value part of a GGUF file, with typed look-ups that name the file and the key in errors."""

    path: str
    values: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        return self.string("general.architecture")

    def string(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._mistyped(key, "a string", value)
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # one value a layer
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._mistyped(key, "an integer, the same for all layers", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._mistyped(key, "a number", value)
        return _shortest(value)

    def strings(self, key: str) -> list[str]:
        return self._list(key, str, "a list of strings")

    def integers(self, key: str) -> list[int]:
        return self._list(key, int, "a list of integers")

    def token_id(self, name: str) -> int | None:
        """The id under ``tokenizer.ggml.{name}_token_id``, `None` when the file has none."""
        key = f"tokenizer.ggml.{name}_token_id"
        return self.integer(key) if key in self.values else None

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: lacks the metadata {key!r}; convert the model to GGUF again")
        return value

    def _list(self, key: str, kind: type, expected: str) -> list[Any]:
        value = self._get(key, None)
        if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
            raise self._mistyped(key, expected, value)
        return value

    def _mistyped(self, key: str, expected: str, value: Any) -> CheckpointError:
        given = repr(value)
        shown = given if len(given) <= 60 else given[:57] + "..."
        return CheckpointError(f"{self.path}: the metadata {key!r} should be {expected}, got {shown}")


def hugging_face_config(
    metadata: Metadata,
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Sequence[float] | None,
) -> dict[str, Any]:
    """A ``config.json`` for the model that `metadata` and the tensors' `shapes` describe.

    `rope_factors` is the content of ``rope_freqs.weight``, [head_dim / 2]. Raises `CheckpointError` for an
    architecture, or a variant of one, that is not supported.
    """
    architecture = metadata.architecture
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{metadata.path}: architecture {architecture!r} is not read from GGUF; supported are "
            f"{', '.join(ARCHITECTURES)}: pass the Hugging Face checkpoint instead"
        )
    if metadata.integer(f"{architecture}.expert_count", 0) > 0:
        raise CheckpointError(f"{metadata.path}: is a mixture of experts, which is not supported; pass a dense model")
    embedding = shapes.get("model.embed_tokens.weight")
    if embedding is None:
        raise CheckpointError(f"{metadata.path}: has no tensor 'token_embd.weight'; convert the model again")
    hidden_size = metadata.integer(f"{architecture}.embedding_length")
    heads = metadata.integer(f"{architecture}.attention.head_count")
    if heads < 1:
        raise CheckpointError(f"{metadata.path}: says it has {heads} attention heads; convert the model again")
    head_dim = metadata.integer(f"{architecture}.attention.key_length", hidden_size // heads)
    _check_head_sizes(metadata, head_dim)
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": embedding[0],
        "hidden_size": hidden_size,
        "intermediate_size": metadata.integer(f"{architecture}.feed_forward_length"),
        "num_hidden_layers": metadata.integer(f"{architecture}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.integer(f"{architecture}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": metadata.number(f"{architecture}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": metadata.integer(f"{architecture}.context_length"),
        "rope_parameters": rope_parameters(metadata, head_dim, rope_factors),
        "attention_bias": any(".self_attn." in name and name.endswith(".bias") for name in shapes),
        "mlp_bias": any(".mlp." in name and name.endswith(".bias") for name in shapes),
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": metadata.token_id("eos"),
        "tie_word_embeddings": "lm_head.weight" not in shapes,
    }


def rope_parameters(metadata: Metadata, head_dim: int, rope_factors: Sequence[float] | None) -> dict[str, Any]:
    """Hugging Face's ``rope_parameters``.

    Baked-in factors become ``llama3`` where that rule gives exactly these factors; otherwise the type is
    ``factors`` (our own): the inverse frequencies are divided by ``factors``, [head_dim / 2].
    """
    prefix = f"{metadata.architecture}.rope."
    theta = metadata.number(prefix + "freq_base", _DEFAULT_ROPE_THETA)
    kind = metadata.string(prefix + "scaling.type", "none")
    legacy_factor = metadata.number(prefix + "scale_linear", 1.0)
    if kind == "none" and legacy_factor != 1.0:
        return {"rope_type": "linear", "rope_theta": theta, "factor": legacy_factor}
    if rope_factors is not None:
        if kind != "none":
            raise CheckpointError(
                f"{metadata.path}: scales its rotary embedding twice (rope_freqs.weight and {kind}), "
                "which is not supported; pass the Hugging Face checkpoint instead"
            )
        return _from_factors(metadata, theta, head_dim, rope_factors)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    for key, value in metadata.values.items():
        name = key.removeprefix(prefix + "scaling.")
        if name not in (key, "type"):
            parameters[_SCALING_NAMES.get(name, name)] = _shortest(value) if isinstance(value, float) else value
    return parameters


def _from_factors(metadata: Metadata, theta: float, head_dim: int, rope_factors: Sequence[float]) -> dict[str, Any]:
    if len(rope_factors) != head_dim // 2:
        raise CheckpointError(
            f"{metadata.path}: rope_freqs.weight has {len(rope_factors)} factors, expected head_dim / 2 = "
            f"{head_dim // 2}; convert the model again"
        )
    if all(factor == 1.0 for factor in rope_factors):
        return {"rope_type": "default", "rope_theta": theta}
    original_length = metadata.integer(
        f"{metadata.architecture}.rope.scaling.original_context_length", _LLAMA3_ORIGINAL_LENGTH
    )
    factor = max(rope_factors)
    expected = _llama3_factors(theta, head_dim, factor, original_length)
    if np.allclose(rope_factors, expected, rtol=1e-4, atol=0.0):
        return {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": _LLAMA3_LOW_FREQ_FACTOR,
            "high_freq_factor": _LLAMA3_HIGH_FREQ_FACTOR,
            "original_max_position_embeddings": original_length,
        }
    return {"rope_type": "factors", "rope_theta": theta, "factors": list(rope_factors)}


def _llama3_factors(theta: float, head_dim: int, factor: float, original_length: int) -> list[float]:
    """What Llama 3.1's rule divides each inverse frequency by: [head_dim / 2]."""
    low, high = _LLAMA3_LOW_FREQ_FACTOR, _LLAMA3_HIGH_FREQ_FACTOR
    factors = []
    for index in range(0, head_dim, 2):
        rotations = original_length / (2 * math.pi * theta ** (index / head_dim))
        smooth = min(max((rotations - low) / (high - low), 0.0), 1.0)
        factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return factors


def _check_head_sizes(metadata: Metadata, head_dim: int) -> None:
    for key in ("attention.value_length", "rope.dimension_count"):
        size = metadata.integer(f"{metadata.architecture}.{key}", head_dim)
        if size != head_dim:
            raise CheckpointError(
                f"{metadata.path}: its {key} is {size} and its head size {head_dim}; only models where they "
                "are equal are supported"
            )


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32, as GGUF stores it: 1e-05, not 9.99999975e-06."""
    return float(str(np.float32(value)))
