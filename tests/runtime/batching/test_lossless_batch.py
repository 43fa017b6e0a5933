"""At temperature 1, a scheduled batch draws from the target's own distribution: a chi-square test.

As `test_lossless_sampling.py`, with requests that share rounds, and lengths that follow confidences and costs.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.runtime import SamplingParams
from dspark_edge.runtime.batching import BatchGenerator, BatchOptions, GroupScheduling
from dspark_edge.runtime.batching.drafting import CallObserver
from dspark_edge.runtime.batching.executor import ModelExecutor, choose_grouping
from dspark_edge.runtime.encoding import PromptEncoder
from dspark_edge.runtime.scheduling import Lagged, LookAhead, Scheduler

from ..scripted import TableCosts
from ..test_lossless_sampling import DEPTH, PROMPT, TargetProbs, outcomes, unchanged

RUNS = 1_200
LENGTH = 8  # of the answers, so that several share a round; their first DEPTH tokens are counted
LEAST_EXPECTED = 10.0
# Dear enough that confidences decide, and not always alike.
COSTS = TableCosts(target=(1.0, 1.35, 1.7, 2.05, 2.4, 2.75, 3.1, 3.45), draft=0.02)
# The same where a call has as many tokens as all requests together.
PACKED_COSTS = TableCosts(target=tuple(1.0 + 0.1 * others for others in range(64)), draft=0.02)


class Unobserved(ModelExecutor):
    """Real times do not correct the made-up costs, so that the result is fixed by the seeds."""

    def observe(self, observer: CallObserver | None) -> None:
        super().observe(None)


@pytest.mark.parametrize(
    ("execution", "scheduler"),
    [("dense", LookAhead()), ("serial", LookAhead()), ("packed", LookAhead()), ("dense", Lagged())],
    ids=["dense", "serial", "packed", "lagged"],
)
def test_draws_of_a_scheduled_batch_follow_the_target(
    request: pytest.FixtureRequest, execution: str, scheduler: Scheduler
) -> None:
    chi2 = pytest.importorskip("scipy.stats").chi2
    path = Path(__file__).parents[2] / "data" / "bundles" / "qwen3_rnn_decomposed"
    if execution == "packed":
        path = request.getfixturevalue("packed_bundle_dir")
    with OnnxRuntimeEngine(Bundle.open(path), threads=1) as engine:
        expected = dict(outcomes(TargetProbs(engine), unchanged, LEAST_EXPECTED / RUNS))
        slots = 4 if execution == "packed" else 8
        executor = Unobserved(engine, slots, choose_grouping(engine, execution, slots, drafting=True), True, 64)
        costs = PACKED_COSTS if execution == "packed" else COSTS
        policy = GroupScheduling(costs, executor.pricing, executor.block_size, scheduler)
        options = BatchOptions("scheduled", slots=slots, queue=RUNS)
        generator = BatchGenerator(executor, PromptEncoder.of(engine.bundle), options, policy)
        tickets = [
            generator.submit(PROMPT, SamplingParams(LENGTH, temperature=1.0, seed=seed, ignore_eos=True))
            for seed in range(RUNS)
        ]
        list(generator.run())
        answers = [ticket.result() for ticket in tickets]
    verified = sum(answer.statistics.draft_tokens for answer in answers)
    assert 0 < verified < 6 * sum(answer.statistics.rounds for answer in answers), "nothing was scheduled"
    counts = Counter(answer.token_ids[:DEPTH] for answer in answers)
    observed = np.array([counts.pop(outcome, 0) for outcome in expected] + [0.0])
    observed[-1] = sum(counts.values())
    wanted = np.array([*expected.values(), 1 - sum(expected.values())]) * RUNS
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    assert chi2.sf(statistic, len(wanted) - 1) > 1e-3
