"""Custom torch operators of the tracing modules.

Each stands for a piece of the model whose best ONNX form depends on where the graph will run: `torch.export` keeps
it as one node, and a lowering (see `dspark_edge.exporter.lowerings`) writes the ONNX operators for it. The bodies
below are the reference implementation in plain torch; `parity` compares engines against them.

Shapes: B batch, W width, H query heads, K key/value heads, D head size, C cache capacity, P rotary positions.
"""

from __future__ import annotations

import torch

__all__ = ["cached_attention", "filter_threshold", "project_vocabulary", "rms_norm", "rotate", "write_cache"]


def rotate(states: torch.Tensor, positions: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply rotary position embedding in the half-split form of Hugging Face models.

    Args:
        states: [B, W, heads, D].
        positions: [B, W] int64.
        cos: [P, D/2] table.
        sin: [P, D/2] table.

    Returns:
        [B, W, heads, D].
    """
    cos_rows = cos[positions].unsqueeze(2)
    sin_rows = sin[positions].unsqueeze(2)
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cos_rows - second * sin_rows, second * cos_rows + first * sin_rows), dim=-1)


def _write(past: torch.Tensor, update: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    index = positions[:, None, :, None].expand(-1, past.shape[1], -1, past.shape[3])
    return past.scatter(2, index, update.transpose(1, 2))


@torch.library.custom_op("dspark::write_cache", mutates_args=())
def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    cache_lengths: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate `key` and write key and value at positions cache_lengths[b] … +W−1 of the caches.

    Args:
        key, value: [B, W, K·D].
        past_key, past_value: [B, K, C, D].
        cache_lengths: [B] int64.
        positions: [B, W] int64, cache_lengths[b] + w; given, so that a graph computes them once for all layers.
        cos, sin: [P, D/2].

    Returns:
        present_key, present_value: [B, K, C, D].
    """
    batch, width, _ = key.shape
    heads, size = past_key.shape[1], past_key.shape[3]
    rotated = rotate(key.view(batch, width, heads, size), positions, cos, sin)
    return (
        _write(past_key, rotated, positions),
        _write(past_value, value.view(batch, width, heads, size), positions),
    )


@write_cache.register_fake
def _(
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    cache_lengths: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(past_key), torch.empty_like(past_value)


@torch.library.custom_op("dspark::cached_attention", mutates_args=())
def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    cache_lengths: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotary embedding, cache update and attention over the valid part of the cache, in one.

    Row w of sequence b stands at position cache_lengths[b] + w. It attends to every cached position before
    cache_lengths[b], and to the rows of this call up to its own (`causal`) or to all of them (a drafter's block).

    Args:
        query: [B, W, H·D], key, value: [B, W, K·D]; not yet rotated.
        past_key, past_value: [B, K, C, D].
        cache_lengths: [B] int64.
        positions: [B, W] int64, cache_lengths[b] + w; given, so that a graph computes them once for all layers.
        cos, sin: [P, D/2].
        causal: whether rows see later rows.
        scale: factor on the attention scores.

    Returns:
        output [B, W, H·D], present_key, present_value [B, K, C, D].
    """
    batch, width, _ = query.shape
    heads, capacity, size = past_key.shape[1], past_key.shape[2], past_key.shape[3]
    present_key, present_value = write_cache(key, value, past_key, past_value, cache_lengths, positions, cos, sin)
    rotated = rotate(query.view(batch, width, -1, size), positions, cos, sin).transpose(1, 2)
    last_visible = positions if causal else positions[:, -1:].expand(-1, width)
    mask = torch.arange(capacity, device=query.device) <= last_visible[:, None, :, None]
    groups = rotated.shape[1] // heads
    output = torch.nn.functional.scaled_dot_product_attention(
        rotated,
        present_key.repeat_interleave(groups, dim=1),
        present_value.repeat_interleave(groups, dim=1),
        attn_mask=mask,
        scale=scale,
    )
    return output.transpose(1, 2).reshape(batch, width, -1), present_key, present_value


@cached_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    cache_lengths: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    causal: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(past_key), torch.empty_like(past_value)


@torch.library.custom_op("dspark::rms_norm", mutates_args=())
def rms_norm(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension, computed in fp32 and given back in the states' type.

    Args:
        states: [..., n].
        weight: [n].
    """
    wide = states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(states.dtype)


@rms_norm.register_fake
def _(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return torch.empty_like(states)


@torch.library.custom_op("dspark::project_vocabulary", mutates_args=())
def project_vocabulary(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Project states on rows of the (tied) vocabulary matrix, so that embedding and head can be one initializer.

    Args:
        states: [R, d].
        weight: [V, d].

    Returns:
        [R, V] in the states' type.
    """
    return states @ weight.t()


@project_vocabulary.register_fake
def _(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return states.new_empty(states.shape[0], weight.shape[0])


@torch.library.custom_op("dspark::filter_threshold", mutates_args=())
def filter_threshold(
    probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, pool: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The probability at and above which top-k, then top-p, then min-p keep a token; equals stay together.

    Args:
        probs: [B, N, V] fp32.
        top_k: [B] int64, 0 = off.
        top_p: [B] fp32, ≥ 1 = off.
        min_p: [B] fp32, 0 = off.
        pool: [1] int64, how many of the likeliest tokens are sorted.

    Returns:
        threshold [B, N] fp32, covered [B] bool: whether the pool was large enough for the threshold to be exact.
    """
    size = min(int(pool), probs.shape[-1])
    ranked = probs.topk(size, dim=-1).values  # [B, N, P]
    k = torch.where(top_k > 0, top_k, torch.full_like(top_k, probs.shape[-1]))[:, None, None]
    within_k = torch.arange(size, device=probs.device) < k
    masses = ranked * within_k.to(probs.dtype)
    cumulative = masses.cumsum(dim=-1)
    # Without top-k the whole mass is 1; with it, what the k likeliest hold.
    limited = (top_k > 0) & (top_k < probs.shape[-1])
    whole = torch.where(limited[:, None], cumulative[..., -1], torch.ones_like(cumulative[..., -1]))
    goal = top_p[:, None, None] * whole[..., None]
    nucleus = (cumulative - masses < goal) | (top_p >= 1)[:, None, None]
    kept = (within_k & nucleus).to(torch.int64).sum(dim=-1).clamp(min=1)  # [B, N]
    lowest = ranked.gather(-1, kept[..., None] - 1).squeeze(-1)
    unlimited = ~limited & (top_p >= 1)
    threshold = torch.where(unlimited[:, None], torch.zeros_like(lowest), lowest)
    threshold = torch.maximum(threshold, min_p[:, None] * ranked[..., 0])
    reached = (cumulative[..., -1] >= goal.squeeze(-1)).all(dim=-1)
    covered = unlimited | (limited & (top_k <= size)) | (reached & ~limited & (top_p < 1))
    return threshold, covered | (size >= probs.shape[-1])


@filter_threshold.register_fake
def _(
    probs: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor, pool: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return probs.new_empty(probs.shape[:2]), probs.new_empty(probs.shape[:1], dtype=torch.bool)
