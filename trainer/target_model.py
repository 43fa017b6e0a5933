"""The target in torch: features and logits for training, and batched generation.

The weights are the exporter's module, read from the same checkpoint by the same recipes; only the way through the
layers is another: whole sequences at once for training, and caches written in place for generation, where the
exporter's traceable operators would copy them at every step.

Shapes: B batch, S sequence, C cache slots, H query heads, K key/value heads, G = H/K, D head size, T taps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.exporter.checkpoint import open_checkpoint
from dspark_edge.exporter.configuration import EMBEDDING_TAP, DecoderConfig, read_decoder_config
from dspark_edge.exporter.modules.layers import Attention, DecoderLayer
from dspark_edge.exporter.modules.target import Target
from dspark_edge.exporter.weights import check_shapes, load_module, target_sources
from dspark_edge.trainer.memory import available_memory, format_bytes

__all__ = ["KeyValueCache", "TargetModel", "rms_norm", "rotate"]


def rms_norm(states: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    """The exporter's RMSNorm module, by torch's own differentiable kernel; computed in fp32."""
    weight: torch.Tensor = norm.weight  # type: ignore[assignment]
    epsilon: float = norm.epsilon  # type: ignore[assignment]
    return functional.rms_norm(states.float(), (weight.shape[0],), weight.float(), epsilon).to(states.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding in the half-split form.

    Args:
        states: [B, heads, S, D].
        cos, sin: [B or 1, 1, S, D/2].
    """
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


@dataclass
class KeyValueCache:
    """Keys and values of every layer, [L][B, K, C, D], written in place, and how much of each row is valid, [B]."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    lengths: torch.Tensor

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all sequences but these, [R] int64."""
        for layer in range(len(self.keys)):
            self.keys[layer] = self.keys[layer].index_select(0, rows)
            self.values[layer] = self.values[layer].index_select(0, rows)
        self.lengths = self.lengths.index_select(0, rows)


class TargetModel:
    """A frozen target on one device.

    Args:
        module: the exporter's target without a drafter, weights loaded.
        config: its configuration.
        device: where it runs.
    """

    def __init__(self, module: Target, config: DecoderConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.module = module.to(device).requires_grad_(False)
        self.dtype = module.embed_tokens.weight.dtype

    @classmethod
    def load(
        cls, source: str | Path, positions: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> TargetModel:
        """Read a target.

        Args:
            source: a folder, a GGUF file or a Hugging Face name.
            positions: longest sequence that will be run, tokens.
            device: where it runs.
            dtype: of weights and activations.

        Raises:
            CheckpointError: it is missing, damaged or unsupported.
            InvalidInputError: it does not fit in memory; the message says how much it needs.
        """
        device = torch.device(device)
        with ExitStack() as stack:
            checkpoint = stack.enter_context(open_checkpoint(source))
            config = read_decoder_config(checkpoint.config, str(source))
            sources = target_sources(checkpoint, config, None, None, positions)
            with torch.device("meta"):
                module = Target(config, None, positions, dtype)
            check_shapes(module, sources, str(source))
            needed = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
            for place in {torch.device("cpu"), device}:  # weights are read on the host and moved as a whole
                free = available_memory(place)
                if needed > free:
                    raise InvalidInputError(
                        f"{source}: the target's weights need {format_bytes(needed)} in "
                        f"{str(dtype).removeprefix('torch.')}, {format_bytes(free)} are free on {place}; "
                        "use a machine with more memory, or a smaller target"
                    )
            load_module(module, sources)
        return cls(module, config, device)

    @property
    def embedding(self) -> torch.Tensor:
        """[V, d]."""
        return self.module.embed_tokens.weight

    @property
    def head(self) -> torch.Tensor:
        """[V, d]."""
        module = self.module
        return (module.embed_tokens if module.lm_head is None else module.lm_head).weight

    def fingerprint(self) -> str:
        """Tells targets of one shape apart, by type and some of their weights; 16 hexadecimal digits."""
        digest = hashlib.sha256(f"{self.config!r} {self.dtype}".encode())
        rows = self.embedding[:: max(1, self.config.vocab_size // 64)]
        for weight in (self.module.norm.weight, rows):
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    def allocate(self, batch: int, capacity: int) -> KeyValueCache:
        """Empty caches.

        Raises:
            InvalidInputError: they do not fit in memory; the message says how much they need.
        """
        shape = (batch, self.config.num_key_value_heads, capacity, self.config.head_dim)
        needed = 2 * self.config.num_layers * math.prod(shape) * self.dtype.itemsize
        free = available_memory(self.device)
        layers = range(self.config.num_layers)
        try:
            if needed > free:
                raise torch.OutOfMemoryError
            return KeyValueCache(
                [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in layers],
                [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in layers],
                torch.zeros(batch, dtype=torch.int64, device=self.device),
            )
        except torch.OutOfMemoryError:  # also where another process was faster
            raise InvalidInputError(
                f"the caches of {batch} sequences of {capacity} tokens need {format_bytes(needed)}, "
                f"{format_bytes(free)} are free on {self.device}; decode fewer sequences together"
            ) from None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [..., d] after the final norm → [..., V] fp32."""
        return functional.linear(hidden, self.head).float()

    @torch.inference_mode()
    def features(self, input_ids: torch.Tensor, taps: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run whole sequences from their first token.

        Args:
            input_ids: [B, S] int64, padded behind with anything: attention is causal.
            taps: layers, −1 for the embedding.

        Returns:
            features [B, S, T·d], the taps' outputs side by side, and the hidden states behind the final norm [B, S, d].
        """
        states = self.module.embed_tokens(input_ids)
        cos, sin = self._rotary(torch.arange(input_ids.shape[1], device=self.device)[None])
        outputs = {EMBEDDING_TAP: states}
        for index, layer in enumerate(self.module.layers):
            states = self._layer(layer, states, cos, sin, None, index)
            outputs[index] = states
        tapped = torch.cat([outputs[tap] for tap in taps], dim=-1) if len(taps) else states[..., :0]
        return tapped, rms_norm(states, self.module.norm)

    @torch.inference_mode()
    def prefill(self, input_ids: torch.Tensor, lengths: torch.Tensor, cache: KeyValueCache, first: int) -> torch.Tensor:
        """Run prompts into rows first … first+B−1 of empty caches.

        Args:
            input_ids: [B, S], padded behind.
            lengths: [B] int64, the prompts' own lengths.
            cache: receives keys and values.
            first: the first row.

        Returns:
            logits [B, V] fp32 behind each prompt's last token.
        """
        batch, width = input_ids.shape
        rows = slice(first, first + batch)
        view = KeyValueCache([keys[rows] for keys in cache.keys], [values[rows] for values in cache.values], lengths)
        states = self.module.embed_tokens(input_ids)
        cos, sin = self._rotary(torch.arange(width, device=self.device)[None])
        for index, layer in enumerate(self.module.layers):
            states = self._layer(layer, states, cos, sin, view, index)
        cache.lengths[rows] = lengths
        last = states[torch.arange(batch, device=self.device), lengths - 1]
        return self.logits(rms_norm(last, self.module.norm))

    @torch.inference_mode()
    def step(self, token_ids: torch.Tensor, cache: KeyValueCache) -> torch.Tensor:
        """Run one token of every sequence, [B] int64, behind its cache; returns logits [B, V] fp32.

        The token's key and value are written, and the caller advances `cache.lengths` where they shall stay.
        """
        states = self.module.embed_tokens(token_ids)[:, None]
        cos, sin = self._rotary(cache.lengths[:, None])
        slots = int(cache.lengths.max()) + 1
        masked = torch.arange(slots, device=self.device)[None] > cache.lengths[:, None]
        for index, layer in enumerate(self.module.layers):
            attended = self._attend_cached(layer, states, cos, sin, cache, index, slots, masked)
            states = states + attended
            states = states + layer.mlp(rms_norm(states, layer.post_attention_layernorm))
        return self.logits(rms_norm(states[:, 0], self.module.norm))

    def _rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [B, S] → cos and sin [B, 1, S, D/2]."""
        table = self.module.rotary
        return table.cos[positions][:, None], table.sin[positions][:, None]

    def _heads(
        self, attention: Attention, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """states [B, S, d] → rotated query [B, H, S, D] and key, and value [B, K, S, D]."""
        batch, width, _ = states.shape
        sizes = [attention.query_size, attention.key_value_size, attention.key_value_size]
        size = self.config.head_dim
        query, key, value = (
            part.reshape(batch, width, -1, size) for part in attention.qkv_proj(states).split(sizes, dim=-1)
        )
        if self.config.qk_norm:
            query, key = rms_norm(query, attention.q_norm), rms_norm(key, attention.k_norm)
        return rotate(query.transpose(1, 2), cos, sin), rotate(key.transpose(1, 2), cos, sin), value.transpose(1, 2)

    def _layer(
        self,
        layer: DecoderLayer,
        states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: KeyValueCache | None,
        index: int,
    ) -> torch.Tensor:
        """A layer over whole sequences; keys and values go to the cache's first slots, where one is given."""
        attention = layer.self_attn
        batch, width, _ = states.shape
        query, key, value = self._heads(attention, rms_norm(states, layer.input_layernorm), cos, sin)
        if cache is not None:
            cache.keys[index][:, :, :width] = key
            cache.values[index][:, :, :width] = value
        attended = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=attention.scale, enable_gqa=True
        )
        states = states + attention.o_proj(attended.transpose(1, 2).reshape(batch, width, -1))
        return states + layer.mlp(rms_norm(states, layer.post_attention_layernorm))

    def _attend_cached(
        self,
        layer: DecoderLayer,
        states: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        cache: KeyValueCache,
        index: int,
        slots: int,
        masked: torch.Tensor,
    ) -> torch.Tensor:
        """Attention of one row a sequence over its cache. Written out: one batched product a key/value head is faster
        on a CPU than the fused kernel, which would repeat keys and values for every query head."""
        attention = layer.self_attn
        batch = states.shape[0]
        query, key, value = self._heads(attention, rms_norm(states, layer.input_layernorm), cos, sin)
        everyone = torch.arange(batch, device=self.device)
        cache.keys[index][everyone, :, cache.lengths] = key[:, :, 0]
        cache.values[index][everyone, :, cache.lengths] = value[:, :, 0]
        keys, values = cache.keys[index][:, :, :slots], cache.values[index][:, :, :slots]
        grouped = query.reshape(batch, keys.shape[1], -1, self.config.head_dim)  # [B, K, G, D]
        scores = (grouped @ keys.transpose(2, 3)).float() * attention.scale
        scores = scores.masked_fill(masked[:, None, None], -math.inf)
        attended = torch.softmax(scores, dim=-1).to(values.dtype) @ values
        return attention.o_proj(attended.reshape(batch, 1, -1))
