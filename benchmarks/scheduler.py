"""What deciding costs: microseconds a round of scheduling, by batch, scheduler and how an engine verifies.

    python benchmarks/scheduler.py [--rounds 2000] [--json FILE]

Deciding is who drafts and how much is verified, learning what is remembered of the round. The costs are made up,
corrected online as in decoding, and the confidences are drawn. Nothing is run. Time is this thread's on a processor.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import thread_time

import numpy as np

from dspark_edge.engines.profile_costs import CostModel, fit_table
from dspark_edge.runtime.batching.pricing import Shared
from dspark_edge.runtime.scheduling import (
    Controller,
    CorrectedCosts,
    Costs,
    Dense,
    EarlyStop,
    Lagged,
    LookAhead,
    Offer,
    Packed,
    ParkingOptions,
    Pricing,
    Scheduler,
)

BLOCK = 7
BATCHES = (1, 2, 4, 8)
CONTEXTS = (128, 512, 2048)
SCHEDULERS: tuple[Scheduler, ...] = (LookAhead(), EarlyStop(), Lagged())
PRICINGS: tuple[Callable[[Costs], Pricing], ...] = (Dense, Shared, Packed)


def made_up_costs() -> CostModel:
    """A device of medium steepness, on the grid of a real profile; packed calls are as wide as all their requests."""
    widths = (*range(1, BLOCK + 2), 10, 12, 14, 16, 17, 24, 32, 33, 48, 64)

    def grid(
        seconds: Callable[[int, int, int], float], widths: tuple[int, ...], contexts: tuple[int, ...]
    ) -> np.ndarray:
        return np.array([[[seconds(b, w, c) for c in contexts] for w in widths] for b in BATCHES])

    target = grid(lambda b, w, c: 0.012 + 0.0011 * b * w + 1e-7 * b * c, widths, CONTEXTS)
    drafter = grid(lambda b, w, c: 0.002 + 0.0003 * b + 2e-8 * b * c, (1,), CONTEXTS)
    sampler = grid(lambda b, w, c: 0.0001 * b * w, widths, (0,))
    return CostModel(
        fit_table(BATCHES, widths, CONTEXTS, target, 0.01 * target),
        fit_table(BATCHES, [1], CONTEXTS, drafter, 0.01 * drafter),
        fit_table(BATCHES, widths, (0,), sampler, 0.01 * sampler),
    )


def microseconds(
    scheduler: Scheduler, pricing: Callable[[Costs], Pricing], batch: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Deciding and learning, of each round."""
    costs = CorrectedCosts(made_up_costs())
    controller = Controller(
        scheduler, pricing(costs), BLOCK, ParkingOptions(), (0.7,) * BLOCK, target_doubt=costs.target_doubt
    )
    states = [controller.join() for _ in range(batch)]
    source = random.Random(0)
    deciding, learning = [], []
    for index in range(rounds):
        contexts = [100 + index + 10 * row for row in range(batch)]
        confidences = [tuple(source.betavariate(3, 1.2) for _ in range(BLOCK)) for _ in range(batch)]
        started = thread_time()
        drafting = controller.drafting(states, contexts)
        offers = [
            Offer(BLOCK if drafts else 0, row if drafts else None, context, False)
            for drafts, row, context in zip(drafting, confidences, contexts, strict=True)
        ]
        plan = controller.plan(states, offers)
        deciding.append(1e6 * (thread_time() - started))
        accepted = [
            next((place for place in range(length) if source.random() > row[place]), length)
            for length, row in zip(plan.lengths, confidences, strict=True)
        ]
        costs.observe_verification(
            batch, 1 + max(plan.lengths), max(contexts), plan.verify_s * source.uniform(0.9, 1.1)
        )
        started = thread_time()
        controller.record(states, plan, accepted)
        learning.append(1e6 * (thread_time() - started))
    return deciding, learning


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the result here, too")
    given = parser.parse_args()
    cells = []
    for pricing in PRICINGS:
        for scheduler in SCHEDULERS:
            for batch in BATCHES:
                deciding, learning = microseconds(scheduler, pricing, batch, given.rounds)
                low, middle, high = (float(np.percentile(deciding, share)) for share in (5, 50, 95))
                names = {"scheduler": type(scheduler).__name__, "pricing": pricing.__name__, "batch": batch}
                cells.append({**names, "deciding": middle, "p5": low, "p95": high, "learning": median(learning)})
                name = f"{names['pricing']:7} {names['scheduler']:10} batch {batch}"
                print(
                    f"{name}  deciding {middle:6.1f} µs (5 % {low:.1f}, 95 % {high:.1f}), "
                    f"learning {median(learning):6.1f} µs"
                )
    if given.json:
        given.json.write_text(json.dumps({"rounds": given.rounds, "cells": cells}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
