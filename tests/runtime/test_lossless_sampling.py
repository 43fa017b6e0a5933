"""At temperature 1, speculative decoding draws from the target's own distribution: a chi-square test.

The first three tokens of 5000 seeded runs are counted as whole outcomes and compared with the exact probabilities,
which are the products of the target's own softmax along each path. Seeds are fixed, so the result is, too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Engine, sized
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.runtime import Generator, GeneratorOptions, SamplingParams
from dspark_edge.runtime.ngram import NgramDrafter
from dspark_edge.runtime.round import Candidates, Draft, Drafter, Request
from dspark_edge.runtime.scheduled_policy import StreamScheduling
from dspark_edge.runtime.scheduling import Lagged, LookAhead, Scheduler

from .scripted import TableCosts

PROMPT = [int(byte) for byte in b"the "]
RUNS = 5_000
DEPTH = 3
# An outcome of its own has at least this many expected counts; all rarer ones are one.
LEAST_EXPECTED = 10.0

Probs = npt.NDArray[np.float64]


class TargetProbs:
    """The target's next-token probabilities after a prefix, straight from the graph."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.graph = engine.bundle.manifest.graphs["target"]

    def __call__(self, prefix: list[int], temperature: float = 1.0) -> Probs:
        sizes = {"batch": 1, "width": len(prefix), "rows": 1, "capacity": 16}
        buffers = {
            spec.name: self.engine.allocate(spec.dtype, sized(spec, sizes))
            for spec in (*self.graph.inputs, self.graph.outputs[0])
        }
        buffers["input_ids"].write(prefix)
        buffers["logit_rows"].write(len(prefix) - 1)
        self.engine.bind("target", buffers).run()
        logits = buffers["logits"].read()[0, 0].astype(np.float64) / temperature
        weights = np.exp(logits - logits.max())
        result: Probs = weights / weights.sum()
        return result


Warp = Callable[[Probs], Probs]


def outcomes(target: TargetProbs, warp: Warp, least: float) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every outcome of DEPTH tokens that is at least so probable, with its exact probability."""
    stack: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while stack:
        path, probability = stack.pop()
        if len(path) == DEPTH:
            yield path, probability
            continue
        for token, step in enumerate(warp(target([*PROMPT, *path]))):
            if probability * step >= least:
                stack.append(((*path, token), probability * float(step)))


class WrongDrafter:
    """Draws from a distribution that has nothing to do with the target's, and says so honestly."""

    block_size = 4
    tokens = np.array([101, 32, 120, 7, 116, 104])
    probs = np.array([0.05, 0.05, 0.3, 0.3, 0.15, 0.15])

    def __init__(self, engine: Engine) -> None:
        shape = (1, self.block_size, len(self.tokens))
        self.candidates = Candidates(
            engine.allocate("int64", shape[:2]), engine.allocate("int64", shape), engine.allocate("float32", shape)
        )
        self.candidates.candidate_ids.write(self.tokens)
        self.candidates.candidate_probs.write(self.probs)

    def draft(self, request: Request, length: int = 0) -> Draft:
        noise = request.random.gumbels(self.block_size, len(self.tokens))
        drawn = self.tokens[(np.log(self.probs) + noise).argmax(axis=1)]
        self.candidates.draft_ids.write(drawn[None])
        return Draft(tuple(drawn.tolist()), None, self.candidates)


def chi_square_p_value(
    bundle_dir: Path,
    make: Callable[[Engine], Drafter] | None,
    warp: Warp,
    scheduling: StreamScheduling | None = None,
    **params: float,
) -> float:
    chi2 = pytest.importorskip("scipy.stats").chi2
    with OnnxRuntimeEngine(Bundle.open(bundle_dir), threads=1) as engine:
        expected = dict(outcomes(TargetProbs(engine), warp, LEAST_EXPECTED / RUNS))
        generator = Generator(engine, GeneratorOptions(), make, scheduling=scheduling)
        counts: Counter[tuple[int, ...]] = Counter()
        for seed in range(RUNS):
            sampling = SamplingParams(max_new_tokens=DEPTH, seed=seed, ignore_eos=True, **params)  # type: ignore[arg-type]
            counts[generator.generate(PROMPT, sampling).token_ids] += 1
    observed = np.array([counts.pop(outcome, 0) for outcome in expected] + [0.0])
    observed[-1] = sum(counts.values())
    wanted = np.array([*expected.values(), 1 - sum(expected.values())]) * RUNS
    assert len(expected) >= 5, "a test of a certain outcome shows nothing"
    if wanted[-1] < 1e-6 * RUNS:  # filters leave no rare outcomes
        assert observed[-1] == 0
        observed, wanted = observed[:-1], wanted[:-1]
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    return float(chi2.sf(statistic, len(wanted) - 1))


def unchanged(probs: Probs) -> Probs:
    return probs


def nucleus(probs: Probs) -> Probs:
    """top-k 12, then top-p 0.9, then min-p 0.02, written out."""
    order = np.argsort(-probs)
    kept = order[:12]
    masses = probs[kept] / probs[kept].sum()
    kept = kept[np.cumsum(masses) - masses < 0.9]
    kept = kept[probs[kept] >= 0.02 * probs.max()]
    result = np.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result


@pytest.mark.parametrize(
    "make", [None, WrongDrafter, lambda engine: NgramDrafter(engine, 4, smallest=1)], ids=["trained", "wrong", "ngram"]
)
def test_draws_follow_the_target(bundle_dir: Path, make: Callable[[Engine], Drafter] | None) -> None:
    assert chi_square_p_value(bundle_dir, make, unchanged, temperature=1.0) > 1e-3


STAIRCASE = TableCosts(target=(1.0, 1.3, 1.3, 1.3, 1.8, 1.8, 1.8, 1.8), draft=0.1)


@pytest.mark.parametrize("scheduler", [LookAhead(), Lagged()], ids=lambda one: type(one).__name__)
def test_draws_follow_the_target_under_scheduling(bundle_dir: Path, scheduler: Scheduler) -> None:
    scheduling = StreamScheduling({"sampler": STAIRCASE}, 7, scheduler)
    assert chi_square_p_value(bundle_dir, None, unchanged, scheduling, temperature=1.0) > 1e-3


@pytest.mark.parametrize("make", [None, WrongDrafter], ids=["trained", "wrong"])
def test_filtered_draws_follow_the_filtered_target(bundle_dir: Path, make: Callable[[Engine], Drafter] | None) -> None:
    assert chi_square_p_value(bundle_dir, make, nucleus, temperature=1.0, top_k=12, top_p=0.9, min_p=0.02) > 1e-3


def test_a_drafter_that_hides_what_it_drew_from_is_found_out(bundle_dir: Path) -> None:
    """The test can fail: the same drafter, claiming to have drawn evenly."""

    class Dishonest(WrongDrafter):
        def __init__(self, engine: Engine) -> None:
            super().__init__(engine)
            self.candidates.candidate_probs.write(1 / len(self.tokens))

    assert chi_square_p_value(bundle_dir, Dishonest, unchanged, temperature=1.0) < 1e-6
