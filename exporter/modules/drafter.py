"""The drafter graph: one call drafts a block of γ tokens.

One parallel pass gives base logits for every position of the block; a small sequential head (Markov, gated or rnn)
walks over them, unrolled, adding to each step's logits a bias that depends on the token drafted before it.
"""

from __future__ import annotations

import torch
from torch import nn

from dspark_edge.exporter import operators
from dspark_edge.exporter.configuration import DrafterConfig
from dspark_edge.exporter.modules.layers import DecoderLayer, Embedding, Projection, RMSNorm, RotaryTable, row_positions

__all__ = ["PEAK_FEATURES", "PEAK_LOGITS", "Drafter", "MarkovHead", "peak_features"]

PEAK_FEATURES = 3
PEAK_LOGITS = 16
"""Largest logits that `peak_features` looks at: what is behind them changes next to nothing."""


def peak_features(best: torch.Tensor) -> torch.Tensor:
    """How sure a draft distribution is of its likeliest token: what a confidence head is told of it.

    It depends on the tokens drafted before, not on the one that is drawn: so a confidence made of it says nothing of
    that one, and verifying by it is lossless (see docs/scheduling.md).

    Args:
        best: [..., M] its largest logits, falling; at least two.

    Returns:
        [..., 3]: the log-probability of the likeliest among them, its lead over the second (logits), its probability.
    """
    first = best[..., :1]
    log_prob = -(best - first).exp().sum(dim=-1, keepdim=True).log()
    return torch.cat((log_prob, first - best[..., 1:2], log_prob.exp()), dim=-1)


class MarkovHead(nn.Module):
    """The sequential head: the token before, the block's hidden row and a state → a bias on the step's logits.

    Computed in fp32 whatever the model's type (paper and reference keep draft probabilities in fp32).
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        rank, hidden = config.markov_rank, config.backbone.hidden_size
        self.kind = config.markov_head
        self.rank = rank
        self.markov_w1 = Embedding(config.backbone.vocab_size, rank, torch.float32)
        self.markov_w2 = Embedding(config.head_size, rank, torch.float32)
        if self.kind == "gated":
            self.gate_proj = Projection(hidden + rank, rank, bias=True)
        elif self.kind == "rnn":
            self.joint_proj = Projection(2 * rank + hidden, 3 * rank, bias=True)

    def features(
        self, edge: torch.Tensor, hidden: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The vector that W2 projects on the draft vocabulary, and the next state; all [B, r], hidden [B, d]."""
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat((hidden, edge), dim=-1))) * edge, state
        if self.kind == "rnn":
            joint = self.joint_proj(torch.cat((state, edge, hidden), dim=-1))
            gate, content, output = joint.split([self.rank] * 3, dim=-1)
            gate = torch.sigmoid(gate)
            state = gate * state + (1.0 - gate) * torch.tanh(content)
            return torch.tanh(output), state
        return edge, state

    def bias(self, features: torch.Tensor, pool_ids: torch.Tensor | None) -> torch.Tensor:
        """features [B, r] → bias on the draft vocabulary [B, P], or on a pool of it: pool_ids [B, M] → [B, M]."""
        if pool_ids is None:
            bias: torch.Tensor = operators.project_vocabulary(features, self.markov_w2.weight)
            return bias
        return (self.markov_w2(pool_ids) @ features.unsqueeze(-1)).squeeze(-1)


class DraftVocabulary(nn.Module):
    """Rows of the head [...] → target token ids [...], by the table of a draft vocabulary [P] int64."""

    def __init__(self, size: int) -> None:
        super().__init__()
        # int64 whatever the model's type: no float type holds every id.
        self.ids = nn.Parameter(torch.empty(size, dtype=torch.int64), requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        # As an embedding, which every backend knows as Gather; indexing would be traced to GatherND.
        return nn.functional.embedding(rows, self.ids[:, None]).squeeze(-1)


class Drafter(nn.Module):
    """Drafts a block after the anchor.

    P stands for the tokens that it drafts: all V of them, or those of its draft vocabulary. Ids that go in or out are
    always the target's.

    Args of forward:
        anchor_ids: [B] int64, the last committed tokens.
        cache_lengths: [B] int64, the anchors' positions.
        temperature: [B] fp32; 0 drafts greedily.
        noise: [B, γ, K] fp32, standard Gumbel noise (zeros when greedy).
        past: per drafter layer context key and value [B, Kv, C, D], in turn.

    Returns:
        draft_ids [B, γ] int64, confidence_logits [B, γ] fp32 or None, candidate_ids [B, γ, K] int64,
        candidate_probs [B, γ, K] fp32 (exactly the probabilities drafted from), base_logits [B, γ, P] fp32 (before
        the sequential head), and the caches with the block's keys and values behind the context.
    """

    def __init__(
        self, config: DrafterConfig, positions: int, candidates: int, pool: int | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        backbone = config.backbone
        self.block_size, self.mask_token_id = config.block_size, config.mask_token_id
        self.candidates, self.pool = candidates, pool
        self.confidence_with_markov = config.confidence_with_markov
        self.confidence_with_draft_probs = config.confidence_with_draft_probs
        # Of a pool there are no others.
        self.peak_logits = min(PEAK_LOGITS, config.head_size, config.head_size if pool is None else pool)
        self.embed_tokens = Embedding(backbone.vocab_size, backbone.hidden_size, dtype)
        self.layers = nn.ModuleList(DecoderLayer(backbone, False, dtype) for _ in range(backbone.num_layers))
        self.norm = RMSNorm(backbone.hidden_size, backbone.rms_norm_eps, dtype)
        self.rotary = RotaryTable(positions, backbone.head_dim, dtype)
        self.lm_head = Embedding(config.head_size, backbone.hidden_size, dtype)
        size = config.draft_vocab_size
        self.draft_vocabulary = None if size is None else DraftVocabulary(size)
        self.markov_head = MarkovHead(config) if config.markov_rank else None
        inputs = backbone.hidden_size + (config.markov_rank if config.confidence_with_markov else 0)
        inputs += PEAK_FEATURES if config.confidence_with_draft_probs else 0
        self.confidence_head = Projection(inputs, 1, bias=True) if config.confidence else None

    def forward(
        self,
        anchor_ids: torch.Tensor,
        cache_lengths: torch.Tensor,
        temperature: torch.Tensor,
        noise: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        masks = torch.full_like(anchor_ids, self.mask_token_id)[:, None].expand(-1, self.block_size - 1)
        states = self.embed_tokens(torch.cat((anchor_ids[:, None], masks), dim=1))
        positions = row_positions(cache_lengths, self.block_size)
        present: list[torch.Tensor] = []
        for index, layer in enumerate(self.layers):
            caches = (past[2 * index], past[2 * index + 1])
            states, key, value = layer(states, *caches, cache_lengths, positions, self.rotary)
            present += [key, value]
        states = self.norm(states)
        batch, width, size = states.shape
        base_logits = operators.project_vocabulary(states.reshape(batch * width, size), self.lm_head.weight)
        base_logits = base_logits.float().reshape(batch, width, -1)
        ids, confidences, candidate_ids, candidate_probs = self._walk(
            anchor_ids, states.float(), base_logits, temperature, noise
        )
        return ids, confidences, candidate_ids, candidate_probs, base_logits, present

    def _walk(
        self,
        anchor_ids: torch.Tensor,
        hidden: torch.Tensor,  # [B, γ, d] fp32
        base_logits: torch.Tensor,  # [B, γ, P] fp32
        temperature: torch.Tensor,
        noise: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """The γ steps of the sequential head.

        A step has only what the next one waits for. Probabilities, confidences and the candidates' ids are made of
        all steps together behind them: a node costs some microseconds however little it computes, and there are γ of
        each in here.
        """
        divisor = torch.where(temperature > 0, temperature, torch.ones_like(temperature))[:, None, None]
        # argmax(logits / T + noise) = argmax(logits + T · noise): scaled once for the whole block.
        noise = noise * divisor
        # The pool bounds what the bias can lift: the M best base logits of each position, once for the whole block.
        pool = torch.topk(base_logits, self.pool, dim=-1) if self.pool is not None else None
        head = self.markov_head
        previous = anchor_ids
        state = hidden.new_zeros(hidden.shape[0], head.rank) if head is not None else hidden
        edges, best, largest, indices, choices = [], [], [], [], []
        for step in range(self.block_size):
            logits = base_logits[:, step] if pool is None else pool.values[:, step]
            pool_ids = None if pool is None else pool.indices[:, step]
            if head is not None:
                edge = head.markov_w1(previous)
                features, state = head.features(edge, hidden[:, step], state)
                logits = logits + head.bias(features, pool_ids)
                edges.append(edge)
            values, rows = torch.topk(logits, self.candidates, dim=-1)
            if pool_ids is not None:
                rows = pool_ids.gather(1, rows)
            choice = rows.gather(1, (values + noise[:, step]).argmax(dim=-1, keepdim=True))  # [B, 1]
            previous = choice.squeeze(1)
            if self.draft_vocabulary is not None:
                previous = self.draft_vocabulary(previous)
            best.append(values)
            indices.append(rows)
            choices.append(choice)
            if self.confidence_with_draft_probs and self.candidates < self.peak_logits:
                largest.append(torch.topk(logits, self.peak_logits, dim=-1).values)
        draft_ids, candidate_ids = torch.cat(choices, dim=1), self._blocks(indices)
        if self.draft_vocabulary is not None:
            draft_ids, candidate_ids = self.draft_vocabulary(draft_ids), self.draft_vocabulary(candidate_ids)
        all_best = self._blocks(best)
        probs = torch.softmax(all_best / divisor, dim=-1)
        if self.confidence_head is None:
            return draft_ids, None, candidate_ids, probs
        feature = hidden
        if self.confidence_with_markov:
            feature = torch.cat((feature, self._blocks(edges)), dim=-1)
        if self.confidence_with_draft_probs:
            peak = self._blocks(largest) if largest else all_best[..., : self.peak_logits]
            feature = torch.cat((feature, peak_features(peak)), dim=-1)
        return draft_ids, self.confidence_head(feature).squeeze(-1), candidate_ids, probs

    def _blocks(self, steps: list[torch.Tensor]) -> torch.Tensor:
        """γ rows [B, N] of the steps → [B, γ, N]. Stacking would take a node a step."""
        return torch.cat(steps, dim=-1).reshape(-1, self.block_size, steps[0].shape[-1])
