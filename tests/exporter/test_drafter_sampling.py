"""Drafting at a temperature: candidates, their probabilities, and draws that follow them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from dspark_edge.exporter.modules.drafter import Drafter
from dspark_edge.exporter.pair import Pair, open_pair
from dspark_edge.exporter.weights import load_module

Checkpoint = Callable[..., Path]
VOCABULARY, CAPACITY, LENGTH = 260, 24, 12


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, make_target: Checkpoint, make_drafter: Checkpoint) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    target = make_target(folder / "target")
    drafter = make_drafter(folder / "drafter", target, block_size=3)
    return open_pair(ExitStack(), target, drafter)  # nothing is held open by a folder of safetensors


def load(pair: Pair, candidates: int, pool: int | None = None) -> Drafter:
    with torch.device("meta"):
        module = pair.build_drafter(CAPACITY, candidates, pool, torch.float32)
    load_module(module, pair.drafter_sources(CAPACITY))
    return module


@torch.no_grad()
def draft(
    module: Drafter, anchors: torch.Tensor, temperature: float, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draft ids, candidate ids and candidate probabilities behind a context that is the same for all."""
    batch = len(anchors)
    generator = torch.Generator().manual_seed(5)
    context = [torch.randn(1, 2, CAPACITY, 16, generator=generator).expand(batch, -1, -1, -1) for _ in range(4)]
    if noise is None:
        noise = torch.zeros(batch, module.block_size, module.candidates)
    lengths, temperatures = torch.full((batch,), LENGTH), torch.full((batch,), temperature)
    ids, _, candidate_ids, candidate_probs, _, _ = module(anchors, lengths, temperatures, noise, context)
    return ids, candidate_ids, candidate_probs


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
@pytest.mark.parametrize("candidates", [1, 16, VOCABULARY])
def test_candidates_are_a_distribution(candidates: int, temperature: float, pair: Pair) -> None:
    anchors = torch.arange(20)
    noise = -torch.log(torch.empty(20, 3, candidates).exponential_(generator=torch.Generator().manual_seed(0)))
    module = load(pair, candidates)
    ids, candidate_ids, probs = draft(module, anchors, temperature, noise if temperature else None)
    assert candidate_ids.shape == probs.shape == (20, 3, candidates)
    assert torch.allclose(probs.sum(-1), torch.ones(20, 3), atol=1e-5)
    assert bool((probs[..., 1:] <= probs[..., :-1]).all())  # best first
    assert all(len(set(row.tolist())) == candidates for row in candidate_ids.reshape(-1, candidates))
    assert bool((candidate_ids == ids[..., None]).any(-1).all())
    if not temperature:
        assert torch.equal(ids, candidate_ids[..., 0])


def test_fewer_candidates_leave_greedy_drafts_as_they_are(pair: Pair) -> None:
    anchors = torch.arange(VOCABULARY)
    every = draft(load(pair, VOCABULARY), anchors, 0.0)[0]
    assert torch.equal(draft(load(pair, 1), anchors, 0.0)[0], every)


def test_a_pool_that_is_large_enough_changes_nothing(pair: Pair) -> None:
    anchors = torch.arange(VOCABULARY)
    noise = -torch.log(torch.empty(VOCABULARY, 3, 8).exponential_(generator=torch.Generator().manual_seed(1)))
    whole = draft(load(pair, 8), anchors, 0.8, noise)
    pooled = draft(load(pair, 8, VOCABULARY), anchors, 0.8, noise)
    assert torch.equal(whole[0], pooled[0]) and torch.equal(whole[1], pooled[1])
    assert torch.allclose(whole[2], pooled[2], atol=1e-6)
    # A small one restricts what can be drafted, and its probabilities are still a distribution over distinct tokens.
    ids, candidate_ids, probs = draft(load(pair, 8, 8), anchors, 0.8, noise)
    assert torch.allclose(probs.sum(-1), torch.ones(VOCABULARY, 3), atol=1e-5)
    assert bool((candidate_ids == ids[..., None]).any(-1).all())
    assert not torch.equal(ids, whole[0])


def test_draws_follow_the_candidate_probabilities(pair: Pair) -> None:
    count, candidates = 20_000, 6
    noise = -torch.log(torch.empty(count, 3, candidates).exponential_(generator=torch.Generator().manual_seed(2)))
    ids, candidate_ids, probs = draft(load(pair, candidates), torch.full((count,), 65), 1.3, noise)
    # The second step is conditional on the first one's draw: take the draws that made it alike.
    likeliest = ids[:, 0] == candidate_ids[:, 0, 0]
    for step, rows in ((0, torch.ones(count, dtype=torch.bool)), (1, likeliest)):
        expected = probs[rows][0, step] * int(rows.sum())
        found = (ids[rows, step, None] == candidate_ids[rows, step]).sum(0)
        keep = expected > 5
        assert int(keep.sum()) > 2
        assert float(((found - expected) ** 2 / expected)[keep].sum()) < 26  # chi-square, 5 degrees: p = 1e-4
