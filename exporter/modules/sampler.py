"""The sampler graphs: target logits and drafts in, accepted lengths and next tokens out.

Three graphs of one contract, so that a round pays only for what its requests ask for and no graph needs control flow:

- `GreedyAcceptance` (role ``sampler_greedy``): every request at temperature 0;
- `SamplingAcceptance` (role ``sampler``): temperature;
- `FilteredAcceptance` (role ``sampler_filtered``): top-k, top-p and min-p as well.

Acceptance is the standard speculative rule (Leviathan et al. 2023; Chen et al. 2023): d is accepted with probability
min(1, target_probs(d) / draft_probs(d)); the first rejected position is drawn from the normalised positive part of
target_probs − draft_probs; after full acceptance the next token comes from target_probs. It is lossless for any draft
distribution, as long as `candidate_probs` is exactly what the drafter drew from.

Shapes: B batch, N rows of logits, V vocabulary, G offered draft positions (N − 1 ≤ G), K candidates.
"""

from __future__ import annotations

import torch
from torch import nn

from dspark_edge.exporter import operators

__all__ = ["FilteredAcceptance", "GreedyAcceptance", "SamplingAcceptance"]

_CDF_BLOCK = 256


def _drafts_by_row(drafts: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """drafts [B, G, …] → [B, N, …]: row n judges draft n; rows past the drafts repeat the last one, never accepted."""
    return drafts.index_select(1, rows.clamp(max=drafts.shape[1] - 1))


def _accepted_lengths(matches: torch.Tensor, rows: torch.Tensor, verify_lengths: torch.Tensor) -> torch.Tensor:
    """matches [B, N] bool → length of the accepted prefix, at most verify_lengths, [B] int64."""
    # The first row that is not accepted; the last row never is, for verify_lengths ≤ N − 1.
    accepted = matches & (rows[None, :] < verify_lengths[:, None])
    return torch.where(accepted, rows.shape[0], rows[None, :]).amin(dim=1)


def _at_row(values: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """values [B, N, X], row [B] → [B, X]."""
    batch, rows, size = values.shape
    first = torch.arange(batch, device=values.device) * rows
    return values.reshape(batch * rows, size).index_select(0, first + row)


def _log_mass(logits: torch.Tensor, highest: torch.Tensor) -> torch.Tensor:
    """logits [B, N, V], highest [B, N, 1] → log Σ exp(logits − highest) [B, N]: of the likeliest token, −log p."""
    return (logits - highest).exp().sum(dim=-1).log()


def _log_probs(logits: torch.Tensor, highest: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability under the target, before temperature and filters, of one token a row: [B, N].

    Args:
        logits: [B, N, V].
        highest: [B, N, 1] of each row.
        tokens: [B, N].
    """
    normaliser = _log_mass(logits, highest) + highest.squeeze(-1)
    return logits.gather(2, tokens[..., None]).squeeze(-1) - normaliser


def _argmax_block(vocabulary: int) -> int | None:
    """The block size of `_likeliest`: the divisor nearest the square root; None where none is near it."""
    root = vocabulary**0.5
    divisors = [size for size in range(2, vocabulary) if vocabulary % size == 0 and 1 / 8 < size / root < 8]
    return min(divisors, key=lambda size: abs(size - root), default=None)


def _likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first largest logit of each row, logits [B, N, V] → index [B, N] int64 and value [B, N, 1].

    In two levels: over the largest logits of blocks, then inside one. CPUs find the largest of a row six times as fast
    as its place.
    """
    batch, rows, vocabulary = logits.shape
    size = _argmax_block(vocabulary)
    if size is None:
        return logits.argmax(dim=-1), logits.amax(dim=-1, keepdim=True)
    peaks = logits.reshape(batch, rows, -1, size).amax(dim=-1)  # [B, N, blocks]
    block = peaks.argmax(dim=-1).reshape(-1)  # [B N]
    inside = _at_row(logits.reshape(batch * rows, vocabulary // size, size), block).argmax(dim=-1)
    return (block * size + inside).reshape(batch, rows), peaks.amax(dim=-1, keepdim=True)


def _committed(
    drafts: torch.Tensor, accepted: torch.Tensor, next_ids: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """The token that row n commits, [B, N]: a draft before the accepted length, the target's own from there on."""
    return torch.where(rows[None, :] < accepted[:, None], drafts, next_ids[:, None])


def _draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw an index with probability proportional to weights [B, V] ≥ 0 from uniforms [B] in [0, 1): [B] int64.

    The inverse of the distribution function, in two levels: over blocks of 256, then inside one. A single running
    sum in fp32 would swallow every token below 6·10⁻⁸ behind a likely one.
    """
    batch, vocabulary = weights.shape
    padding = -vocabulary % _CDF_BLOCK
    blocks = nn.functional.pad(weights, (0, padding)).reshape(batch, -1, _CDF_BLOCK)
    cumulative = blocks.sum(dim=-1).cumsum(dim=1)  # [B, blocks]
    goal = uniforms[:, None] * cumulative[:, -1:]
    block = (cumulative <= goal).to(torch.int64).sum(dim=1).clamp(max=cumulative.shape[1] - 1)
    mass = _at_row(blocks, block)  # [B, 256]
    before = nn.functional.pad(cumulative, (1, 0)).gather(1, block[:, None])
    inside = mass.cumsum(dim=1)
    hits = ((inside > goal - before) & (mass > 0)).to(torch.int64)
    # Rounding can leave no hit at a block's very end: its likeliest token stands in.
    index = torch.where(hits.amax(dim=1) > 0, hits.argmax(dim=1), mass.argmax(dim=1))
    return block * _CDF_BLOCK + index


class GreedyAcceptance(nn.Module):
    """Temperature 0: the longest prefix equal to the target's argmax, then the target's own argmax.

    Args of forward: logits fp32 [B, N, V], draft_ids [B, G] int64, verify_lengths [B] int64 (≤ N − 1).
    Returns: accepted_lengths [B] int64, next_ids [B] int64, log_probs [B, N] fp32 (rows past the accepted length
    carry no meaning).
    """

    def forward(
        self, logits: torch.Tensor, draft_ids: torch.Tensor, verify_lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = torch.arange(logits.shape[1], device=logits.device)
        choices, highest = _likeliest(logits)
        drafts = _drafts_by_row(draft_ids, rows)
        accepted = _accepted_lengths(drafts == choices, rows, verify_lengths)
        # Up to the accepted length the target's choices are the drafts, so they are what each row commits.
        next_ids = choices.gather(1, accepted[:, None]).squeeze(1)
        return accepted, next_ids, -_log_mass(logits, highest)


class SamplingAcceptance(nn.Module):
    """Any temperature, per request; 0 stays greedy.

    Args of forward: logits fp32 [B, N, V], draft_ids [B, G] int64, verify_lengths [B] int64, candidate_ids [B, G, K]
    int64 (distinct in a position), candidate_probs [B, G, K] fp32, accept_uniforms [B, N] fp32 and sample_uniforms
    [B] fp32 in [0, 1), temperature [B] fp32.
    Returns: as `GreedyAcceptance`.
    """

    def forward(
        self,
        logits: torch.Tensor,
        draft_ids: torch.Tensor,
        verify_lengths: torch.Tensor,
        candidate_ids: torch.Tensor,
        candidate_probs: torch.Tensor,
        accept_uniforms: torch.Tensor,
        sample_uniforms: torch.Tensor,
        temperature: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        probs = self.target_probs(logits, temperature)
        return self.accept(
            logits,
            probs,
            draft_ids,
            verify_lengths,
            candidate_ids,
            candidate_probs,
            accept_uniforms,
            sample_uniforms,
            temperature,
        )

    def target_probs(self, logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        divisor = torch.where(temperature > 0, temperature, torch.ones_like(temperature))
        return torch.softmax(logits / divisor[:, None, None], dim=-1)

    def accept(
        self,
        logits: torch.Tensor,
        probs: torch.Tensor,
        draft_ids: torch.Tensor,
        verify_lengths: torch.Tensor,
        candidate_ids: torch.Tensor,
        candidate_probs: torch.Tensor,
        accept_uniforms: torch.Tensor,
        sample_uniforms: torch.Tensor,
        temperature: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rows = torch.arange(logits.shape[1], device=logits.device)
        greedy = temperature <= 0
        choices, highest = _likeliest(logits)
        drafts = _drafts_by_row(draft_ids, rows)
        candidates = _drafts_by_row(candidate_ids, rows)
        draft_probs = _drafts_by_row(candidate_probs, rows)

        drafted = (draft_probs * (candidates == drafts[..., None]).to(probs.dtype)).sum(dim=-1)
        wanted = probs.gather(2, drafts[..., None]).squeeze(-1)
        sampled_matches = accept_uniforms * drafted < wanted
        is_greedy = greedy[:, None]  # ONNX Runtime has no Where on bool
        matches = (is_greedy & (drafts == choices)) | (~is_greedy & sampled_matches)
        accepted = _accepted_lengths(matches, rows, verify_lengths)

        final = _at_row(probs, accepted)  # [B, V]
        rejected = (accepted < verify_lengths).to(probs.dtype)[:, None]
        ids = _at_row(candidates, accepted)
        kept = (final.gather(1, ids) - rejected * _at_row(draft_probs, accepted)).clamp(min=0)
        residual = final.scatter(1, ids, kept)
        # Equal distributions have no residual; only rounding gets here, and then the target itself is drawn from.
        residual = torch.where(residual.amax(dim=1, keepdim=True) > 0, residual, final)
        drawn = _draw(residual, sample_uniforms)
        next_ids = torch.where(greedy, choices.gather(1, accepted[:, None]).squeeze(1), drawn)
        return accepted, next_ids, _log_probs(logits, highest, _committed(drafts, accepted, next_ids, rows))


class FilteredAcceptance(SamplingAcceptance):
    """Temperature, then top-k, then top-p, then min-p, each on what the one before left (as Hugging Face does).

    Further args of forward: top_k [B] int64 (0 = off), top_p [B] fp32 (1 = off), min_p [B] fp32 (0 = off), pool [1]
    int64: how many of the likeliest tokens are sorted. Further result: covered [B] bool; where it is false the kept
    set reaches beyond the pool, and the caller runs the graph again with pool = V. Exact either way; a full sort of
    the vocabulary every round would cost more than the drafter.
    """

    def forward(  # type: ignore[override]
        self,
        logits: torch.Tensor,
        draft_ids: torch.Tensor,
        verify_lengths: torch.Tensor,
        candidate_ids: torch.Tensor,
        candidate_probs: torch.Tensor,
        accept_uniforms: torch.Tensor,
        sample_uniforms: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        pool: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        probs = self.target_probs(logits, temperature)
        threshold, covered = operators.filter_threshold(probs, top_k, top_p, min_p, pool)
        probs = torch.where(probs >= threshold[..., None], probs, torch.zeros_like(probs))
        probs = probs / probs.sum(dim=-1, keepdim=True)
        accepted, next_ids, log_probs = self.accept(
            logits,
            probs,
            draft_ids,
            verify_lengths,
            candidate_ids,
            candidate_probs,
            accept_uniforms,
            sample_uniforms,
            temperature,
        )
        # A greedy request needs no filter, so none can fail to cover it.
        return accepted, next_ids, log_probs, covered | (temperature <= 0)
