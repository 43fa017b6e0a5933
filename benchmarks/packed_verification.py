"""What verifying packed tokens could bring where many requests decode: a bound from above, measured.

    python benchmarks/packed_verification.py BUNDLE [--survival 0.6 0.3 0.15 ...] [--context 256] [--json FILE]

Packed verification runs everything but attention on the Σ(1 + ℓ) tokens that exist, where a dense call pads every
request to the widest and the `ort` lowering makes a call for each. A packed call of N tokens is at best as fast as one
sequence's call of N tokens, whose attention is a single cache's, and its drafter's call at best as fast as one block's.
So the target is timed at batch 1 and every width up to all that the largest batch could verify, and from it, for each
batch:

- plain: one token of each request, in the call that this engine makes of it, measured;
- packed: the best fixed number of draft tokens by the survivals given;
- foreseen: exactly those draft tokens are verified that will be accepted, which no scheduler can do better.

All in tokens a second, by those of plain decoding. Where even `foreseen` does not clearly exceed 1, the device computes
for every token of a batch already, and no layout of the tokens changes that.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.runtime.batching.probe import BatchProbe
from dspark_edge.runtime.profile_probe import StreamProbe
from dspark_edge.runtime.reporting.circumstances import machine_facts, versions_of

BATCHES = (1, 2, 4, 8)
# Chances that the first k drafts are accepted: SmolLM2's drafter on code, greedy.
SURVIVALS = (0.45, 0.20, 0.10, 0.05, 0.03, 0.01, 0.01)


def grid(most: int) -> list[int]:
    """Widths to measure: all of the small ones, every fourth of the others."""
    return [*range(1, 9), *range(12, most + 1, 4)]


def measure(arguments: argparse.Namespace) -> tuple[dict[int, float], dict[int, float], float]:
    """Seconds of target and sampler by width at batch 1 and by batch at width 1, and of the drafter."""
    bundle = Bundle.open(arguments.bundle)
    widest = max(BATCHES) * (1 + bundle.manifest.drafter.block_size)
    with OnnxRuntimeEngine(bundle, "cpu", arguments.threads) as engine:
        wide = StreamProbe(engine, 1, arguments.context + widest, widest=widest)
        batches = {batch: BatchProbe(engine, batch, arguments.context + 2) for batch in BATCHES}
        by_width: dict[int, list[float]] = {width: [] for width in grid(widest)}
        by_batch: dict[int, list[float]] = {batch: [] for batch in BATCHES}
        drafts: list[float] = []
        for sweep in range(arguments.sweeps + 1):
            for width, of_width in by_width.items():
                times = wide.run(arguments.context, width, "sampler_greedy")
                if sweep:  # the first one binds and warms up
                    of_width.append(times.target_s + times.sampler_s)
                    drafts += [times.draft_s] if times.draft_s is not None else []
            for batch, of_batch in by_batch.items():
                times = batches[batch].run(arguments.context, 1, "sampler_greedy")
                if sweep:
                    of_batch.append(times.target_s + times.sampler_s)
    return (
        {width: median(times) for width, times in by_width.items()},
        {batch: median(times) for batch, times in by_batch.items()},
        median(drafts),
    )


def between(costs: dict[int, float], width: float) -> float:
    """Seconds at a width between measured ones, on a straight line."""
    return float(np.interp(width, [*costs], [*costs.values()]))


def bounds(
    by_width: dict[int, float], by_batch: dict[int, float], draft_s: float, survivals: list[float]
) -> list[dict[str, Any]]:
    rows = []
    tau = 1 + sum(survivals)
    for batch in BATCHES:
        plain = batch / by_batch[batch]
        packed = {
            length: batch * (1 + sum(survivals[:length])) / (draft_s + between(by_width, batch * (1 + length)))
            for length in range(1, len(survivals) + 1)
        }
        best = max(packed, key=lambda length: packed[length])
        foreseen = batch * tau / (draft_s + between(by_width, batch * tau))
        rows.append(
            {
                "batch": batch,
                "plain_tokens_per_second": plain,
                "packed": packed[best] / plain,
                "packed_length": best,
                "foreseen": foreseen / plain,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--survival", type=float, nargs="+", default=list(SURVIVALS))
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--sweeps", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the result here, too")
    arguments = parser.parse_args()
    by_width, by_batch, draft_s = measure(arguments)
    print("ms by width:  " + "  ".join(f"{width}: {1e3 * cost:.1f}" for width, cost in by_width.items()))
    print("ms by batch:  " + "  ".join(f"{batch}: {1e3 * cost:.1f}" for batch, cost in by_batch.items()))
    print(f"ms of a draft: {1e3 * draft_s:.1f}")
    rows = bounds(by_width, by_batch, draft_s, arguments.survival)
    for row in rows:
        print(
            f"batch {row['batch']}: plain {row['plain_tokens_per_second']:.1f} tokens/s, packed at best "
            f"{row['packed']:.2f}x ({row['packed_length']} drafts each), were all foreseen {row['foreseen']:.2f}x"
        )
    if arguments.json:
        result = {
            "machine": machine_facts(),
            "versions": versions_of(("dspark-edge", "onnxruntime", "numpy")),
            "survivals": arguments.survival,
            "context": arguments.context,
            "target_ms_by_width": {width: 1e3 * cost for width, cost in by_width.items()},
            "plain_ms_by_batch": {batch: 1e3 * cost for batch, cost in by_batch.items()},
            "draft_ms": 1e3 * draft_s,
            "batches": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
