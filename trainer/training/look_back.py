"""Attention that looks at the latest context from the first step.

A drafter's first slot has to read what the target thought at the token just before the anchor, its other slots what
lies a little further back. From random queries and keys attention is spread evenly over the whole context, and a
single position's say in it is lost; finding the last position is most of what a drafter does in its first thousand
steps. So queries and keys start with a part that depends on no content: constant vectors, laid so that under the
rotary embedding their product peaks at a chosen distance and falls off on both sides.

For a pair of rotary dimensions with frequency θ, a key (1, 0) and a query (cos θD, −sin θD), the product between a
query at position p and a key at s is cos θ(p − s − D): all pairs agree at the distance D alone. Fast pairs make the
peak narrow.

A projection without bias has constant outputs along directions in which its inputs are constant. Those are found by
ridge regression: on the embeddings, which share a large mean, for queries, and on a sample of the context's states
for keys, where embeddings, which a block's own keys come from, are to give nothing.
"""

from __future__ import annotations

import torch

from dspark_edge.trainer.training.drafter_model import TrainableDrafter

__all__ = ["constant_direction", "look_back", "recency_vectors"]

# Which rotary pairs, as shares of all, the heads of each key/value group use in turn: the latest token, the latest
# few, and no preference.
_BANDS = ((0.0, 0.19), (0.09, 0.38), None)
_DISTANCES = (1, 2, 3)  # of a group's query heads, in turn
_CONTENT = 0.5  # what stays of the random part
_RIDGE = 1e-3
_MOST_TOKENS = 8192


def constant_direction(states: torch.Tensor, silent: torch.Tensor | None = None) -> torch.Tensor:
    """The [d] vector whose product with the states [N, d] is nearest to 1, and with `silent` [M, d] to 0."""
    rows, wanted = states, torch.ones(len(states))
    if silent is not None:
        # Both sides weigh the same, however many rows they have.
        weight = (len(states) / len(silent)) ** 0.5
        rows, wanted = torch.cat((states, silent * weight)), torch.cat((wanted, torch.zeros(len(silent))))
    gram = rows.T @ rows
    gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram, rows.T @ wanted)


def recency_vectors(
    frequencies: torch.Tensor, band: tuple[float, float], distance: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A constant query and key whose rotated product peaks at a distance.

    Args:
        frequencies: [D/2] radians a position, falling.
        band: which of them are used, as shares of their number.
        distance: tokens between the query and the key.

    Returns:
        query and key [D], in the half-and-half order of rotary dimensions, each of root mean square 1.
    """
    pairs = len(frequencies)
    first, last = round(band[0] * pairs), max(round(band[1] * pairs), round(band[0] * pairs) + 1)
    used = torch.zeros(pairs)
    used[first:last] = (2 * pairs / (last - first)) ** 0.5
    angle = frequencies * distance
    query = torch.cat((used * torch.cos(angle), -used * torch.sin(angle)))
    return query, torch.cat((used, torch.zeros(pairs)))


@torch.no_grad()
def look_back(drafter: TrainableDrafter, embedding: torch.Tensor, sample: torch.Tensor) -> None:
    """Lay the recency part into queries and keys of every layer.

    Args:
        drafter: initialised at random, its feature scale set; on the CPU.
        embedding: [V, d], the target's.
        sample: [N, T·d] features of some tokens.
    """
    config = drafter.config.backbone
    size = config.head_dim
    frequencies = torch.atan2(drafter.sin[1], drafter.cos[1]).float()
    context = drafter.hidden_norm(drafter.fc(sample.float() * drafter.feature_scale))
    tokens = embedding[: min(len(embedding), _MOST_TOKENS)]
    mask = embedding[drafter.config.mask_token_id].expand(len(tokens) // 2, -1)  # most slots of a block hold it
    block = torch.nn.functional.rms_norm(torch.cat((tokens, mask)), (config.hidden_size,))
    to_query, to_key = constant_direction(block), constant_direction(context, block)
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in drafter.layers:
        attention = layer.self_attn
        query_weight = attention.q_proj.weight.view(config.num_attention_heads, size, -1)
        key_weight = attention.k_proj.weight.view(config.num_key_value_heads, size, -1)
        for head in range(config.num_key_value_heads):
            band = _BANDS[head % len(_BANDS)]
            if band is None:
                continue
            for member in range(groups):
                distance = _DISTANCES[(head // len(_BANDS) + member) % len(_DISTANCES)]
                query, key = recency_vectors(frequencies, band, distance)
                if member == 0:
                    key_weight[head] *= _CONTENT
                    key_weight[head] += key[:, None] * to_key
                query_weight[head * groups + member] *= _CONTENT
                query_weight[head * groups + member] += query[:, None] * to_query
