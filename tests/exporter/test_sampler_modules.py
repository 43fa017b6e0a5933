"""The sampler modules: the acceptance rule on hand-sized cases, the filters against numpy, the graphs against torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.exporter import operators
from dspark_edge.exporter.graph_runner import GraphRunner
from dspark_edge.exporter.lowerings import LOWERINGS
from dspark_edge.exporter.modules.sampler import (
    FilteredAcceptance,
    GreedyAcceptance,
    SamplingAcceptance,
    _argmax_block,
    _likeliest,
)

BLOCK, VOCABULARY = 4, 11
CHOICES = [3, 1, 4, 1, 5]  # the target's favourite of every row
NEVER, ALWAYS = 0.9999, 0.0  # uniforms


def logits_of(choices: list[int], margin: float = 3.0) -> torch.Tensor:
    logits = torch.zeros(1, len(choices), VOCABULARY)
    logits[0, torch.arange(len(choices)), torch.tensor(choices)] = margin
    return logits


def certain(drafts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of a drafter that drafts these with probability 1: ids and probabilities [1, G, 2]."""
    ids = torch.tensor([[[draft, (draft + 1) % VOCABULARY] for draft in drafts]])
    return ids, torch.tensor([1.0, 0.0]).expand(1, len(drafts), 2).contiguous()


def log_softmax_at(logits: torch.Tensor, row: int, token: int) -> float:
    return float(torch.log_softmax(logits[0, row], dim=-1)[token])


@pytest.mark.parametrize(
    ("vocabulary", "block"),
    [(12, 3), (11, None), (49152, 192), (151936, 128), (128256, 334), (50257, 29), (2 * 50333, None)],
)
def test_the_block_of_the_argmax_divides_the_vocabulary(vocabulary: int, block: int | None) -> None:
    assert _argmax_block(vocabulary) == block


@pytest.mark.parametrize("vocabulary", [11, 12, 64])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_the_likeliest_is_the_first_of_equals(vocabulary: int, levels: int) -> None:
    """With few different values every row has ties, within blocks and across them."""
    source = torch.Generator().manual_seed(levels)
    logits = torch.randint(0, levels, (3, 40, vocabulary), generator=source).float() - 1
    choices, highest = _likeliest(logits)
    assert choices.tolist() == logits.numpy().argmax(axis=-1).tolist()
    assert highest.tolist() == logits.amax(dim=-1, keepdim=True).tolist()


@pytest.mark.parametrize("verify", range(BLOCK + 1))
@pytest.mark.parametrize("wrong", range(BLOCK + 1))  # the first draft that is not the target's; BLOCK: none
def test_greedy_takes_the_prefix_that_agrees(wrong: int, verify: int) -> None:
    drafts = [(token + 1) % VOCABULARY if row == wrong else token for row, token in enumerate(CHOICES[:BLOCK])]
    logits = logits_of(CHOICES[: verify + 1])
    greedy = GreedyAcceptance()(logits, torch.tensor([drafts]), torch.tensor([verify]))
    uniforms = torch.full((1, verify + 1), NEVER), torch.tensor([0.5])
    sampling = SamplingAcceptance()(
        logits, torch.tensor([drafts]), torch.tensor([verify]), *certain(drafts), *uniforms, torch.zeros(1)
    )
    expected = min(wrong, verify)
    for accepted, following, log_probs in (greedy, sampling):
        assert accepted.tolist() == [expected]
        assert following.tolist() == [CHOICES[expected]]
        for row, token in enumerate(CHOICES[: expected + 1]):  # what the round commits
            assert log_probs[0, row].item() == pytest.approx(log_softmax_at(logits, row, token), abs=1e-5)


@pytest.mark.parametrize("rejected", range(BLOCK + 1))
def test_sampling_rejects_by_the_uniforms(rejected: int) -> None:
    drafts = CHOICES[:BLOCK]
    logits = logits_of(CHOICES)
    uniforms = torch.full((1, BLOCK + 1), ALWAYS)
    if rejected < BLOCK:
        uniforms[0, rejected] = NEVER  # the target gives its favourite less than 1, the drafter all
    accepted, following, log_probs = SamplingAcceptance()(
        logits,
        torch.tensor([drafts]),
        torch.tensor([BLOCK]),
        *certain(drafts),
        uniforms,
        torch.tensor([0.3]),
        torch.ones(1),
    )
    assert accepted.tolist() == [rejected]
    if rejected < BLOCK:  # the residual gives the rejected token nothing
        assert following.item() != CHOICES[rejected]
    committed = [*drafts[:rejected], int(following)]
    for row, token in enumerate(committed):
        assert log_probs[0, row].item() == pytest.approx(log_softmax_at(logits, row, token), abs=1e-5)


def test_a_batch_mixes_greedy_and_sampled_requests() -> None:
    logits = logits_of(CHOICES).repeat(3, 1, 1)
    drafts = torch.tensor([CHOICES[:BLOCK]] * 3)
    ids, probs = (tensor.repeat(3, 1, 1) for tensor in certain(CHOICES[:BLOCK]))
    uniforms = torch.full((3, BLOCK + 1), NEVER)
    accepted, following, _ = SamplingAcceptance()(
        logits,
        drafts,
        torch.tensor([4, 4, 0]),
        ids,
        probs,
        uniforms,
        torch.tensor([0.5] * 3),
        torch.tensor([0.0, 1.0, 1.0]),
    )
    assert accepted.tolist() == [4, 0, 0]  # greedy ignores the uniforms
    assert following[0] == CHOICES[4]


@pytest.mark.parametrize("verify", [0, 2])
def test_the_committed_token_follows_the_target(verify: int) -> None:
    """Whatever the drafter: the first committed token is distributed as the target's own (losslessness)."""
    generator = torch.Generator().manual_seed(0)
    count, size = 40_000, 6
    logits = torch.randn(1, verify + 1, size, generator=generator).repeat(count, 1, 1)
    ids = torch.tensor([4, 0, 2]).expand(count, 2, 3)  # not all tokens are candidates
    probs = torch.tensor([0.6, 0.3, 0.1]).expand(count, 2, 3)
    picks = torch.multinomial(probs.reshape(-1, 3), 1, generator=generator).reshape(count, 2, 1)
    drafts = ids.gather(2, picks).squeeze(2)
    accepted, following, _ = SamplingAcceptance()(
        logits,
        drafts,
        torch.full((count,), verify),
        ids,
        probs,
        torch.rand(count, verify + 1, generator=generator),
        torch.rand(count, generator=generator),
        torch.full((count,), 0.8),
    )
    first = torch.where(accepted > 0, drafts[:, 0], following)
    expected = torch.softmax(logits[0, 0] / 0.8, dim=-1) * count
    found = torch.bincount(first, minlength=size)
    assert float(((found - expected) ** 2 / expected).sum()) < 25  # chi-square, 5 degrees: p = 1e-4


def kept_by_numpy(probs: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Temperature has been applied; each filter works on what the one before left, equals stay together."""
    order = np.argsort(-probs, kind="stable")
    kept = np.ones(len(probs), bool)
    if 0 < top_k < len(probs):
        kept &= probs >= probs[order[top_k - 1]]
        share = np.where(np.isin(np.arange(len(probs)), order[:top_k]), probs, 0)
        share = share / share.sum()
    else:
        share = probs
    if top_p < 1:
        before = np.cumsum(share[order]) - share[order]
        last = order[max(int((before < top_p).sum()), 1) - 1]
        kept &= probs >= probs[last]
    if min_p > 0:
        kept &= probs >= min_p * probs.max()
    return set(np.flatnonzero(kept).tolist())


FILTERS = [(top_k, top_p, min_p) for top_k in (0, 1, 3, 50) for top_p in (0.0, 0.35, 0.9, 1.0) for min_p in (0.0, 0.2)]


@pytest.mark.parametrize("tied", [False, True])
def test_filters_equal_numpy(tied: bool) -> None:
    generator = np.random.default_rng(3)
    raw = generator.integers(1, 4, (8, 20)).astype(float) if tied else generator.dirichlet(np.full(20, 0.5), 8)
    probs = (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)
    for top_k, top_p, min_p in FILTERS:
        options = torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]), torch.tensor([20])
        threshold, covered = operators.filter_threshold(torch.from_numpy(probs)[None], *options)
        assert bool(covered)
        for row, limit in zip(probs, threshold[0].numpy(), strict=True):
            assert set(np.flatnonzero(row >= limit).tolist()) == kept_by_numpy(row, top_k, top_p, min_p), (
                top_k,
                top_p,
                min_p,
            )


@pytest.mark.parametrize(
    ("top_k", "top_p", "pool", "covered"),
    [
        (0, 1.0, 2, True),  # nothing to sort for
        (2, 1.0, 2, True),
        (3, 1.0, 2, False),
        (0, 0.65, 2, True),  # two tokens hold 0.7
        (0, 0.75, 2, False),
        (0, 0.75, 3, True),
        (4, 0.5, 2, False),  # what top-k leaves is not all in the pool
        (0, 0.999, 5, True),
        (5, 0.5, 2, True),  # top_k of the vocabulary's size limits nothing
    ],
)
def test_a_pool_that_is_too_small_says_so(top_k: int, top_p: float, pool: int, covered: bool) -> None:
    probs = torch.tensor([[[0.4, 0.3, 0.15, 0.1, 0.05]]])
    options = torch.tensor([top_k]), torch.tensor([top_p]), torch.zeros(1), torch.tensor([pool])
    threshold, given = operators.filter_threshold(probs, *options)
    assert given.tolist() == [covered]
    if covered:
        exact, _ = operators.filter_threshold(probs, *options[:3], torch.tensor([5]))
        assert threshold.tolist() == exact.tolist()


def random_inputs(batch: int, seed: int) -> dict[str, Any]:
    """Inputs of every sampler graph: a drafter that knows the target roughly, requests of all kinds."""
    generator = np.random.default_rng(seed)
    vocabulary, block, candidates = 260, 7, 9
    width = int(generator.integers(1, block + 2))
    logits = generator.normal(0, 3, (batch, width, vocabulary)).astype(np.float32)
    guesses = np.concatenate([logits, generator.normal(0, 3, (batch, block, vocabulary))], axis=1)[:, :block]
    guesses = guesses + generator.normal(0, 0.5, guesses.shape)
    ids = np.argsort(-guesses, axis=-1)[..., :candidates]
    probs = np.exp(np.take_along_axis(guesses, ids, -1))
    probs = (probs / probs.sum(-1, keepdims=True)).astype(np.float32)
    picks = np.minimum(generator.geometric(0.7, (batch, block, 1)) - 1, candidates - 1)
    return {
        "logits": logits,
        "draft_ids": np.take_along_axis(ids, picks, -1)[..., 0],
        "verify_lengths": generator.integers(0, width, batch),
        "candidate_ids": ids,
        "candidate_probs": probs,
        "accept_uniforms": generator.random((batch, width), np.float32),
        "sample_uniforms": generator.random(batch, np.float32),
        "temperature": generator.choice([0.0, 0.6, 1.0], batch).astype(np.float32),
        "top_k": generator.choice([0, 5, 40], batch),
        "top_p": generator.choice([0.5, 0.9, 1.0], batch).astype(np.float32),
        "min_p": generator.choice([0.0, 0.1], batch).astype(np.float32),
        "pool": np.array([32]),
    }


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_graphs_equal_torch(lowering: str, reference_bundle: Callable[..., Path]) -> None:
    bundle = Bundle.open(reference_bundle("qwen3_target", "qwen3_vanilla", lowering))
    modules = {
        "sampler_greedy": GreedyAcceptance(),
        "sampler": SamplingAcceptance(),
        "sampler_filtered": FilteredAcceptance(),
    }
    lengths: Counter[int] = Counter()
    with OnnxRuntimeEngine(bundle, threads=1) as engine:
        runner = GraphRunner(engine, 16)
        for role, module in modules.items():
            graph = bundle.manifest.graphs[role]
            for seed in range(12):
                inputs = random_inputs(batch=1 + seed % 3, seed=seed)
                taken = {spec.name: inputs[spec.name] for spec in graph.inputs}
                given = runner.run(role, taken)
                expected = module(*(torch.from_numpy(np.ascontiguousarray(value)) for value in taken.values()))
                for spec, value in zip(graph.outputs, expected, strict=True):
                    if spec.name == "log_probs":
                        np.testing.assert_allclose(given[spec.name], value.numpy(), atol=1e-4)
                    else:
                        np.testing.assert_array_equal(given[spec.name], value.numpy(), f"{role} {spec.name} {seed}")
                lengths.update(given["accepted_lengths"].tolist())
    assert len(lengths) > 3  # the inputs do meet the rule's branches
