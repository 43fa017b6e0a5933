"""How long streams stand still while a long prompt is read beside them.

    python benchmarks/prefill_stall.py BUNDLE [--streams 3] [--prompt 2000] [--chunks auto 64 16] [--json FILE]

Some requests decode; then one with a long prompt joins. Reported for each chunk size: median and 99th percentile of the
time between a stream's tokens before it came and while it was read, and how fast the prompt was read. The bar of this
project: the 99th percentile while it is read is at most three times the median before.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from dspark_edge.runtime import SamplingParams
from dspark_edge.runtime.batching import BatchGenerator

SETTLING = 24  # rounds until streams are measured
BEFORE = 64  # rounds that are measured before the prompt comes


def gaps_of(times: dict[int, list[float]], begin: float, end: float) -> np.ndarray:
    """Seconds between events of one stream that lie within a span."""
    within = [[time for time in of_one if begin <= time <= end] for of_one in times.values()]
    return np.concatenate([np.diff(of_one) for of_one in within])


def measure(arguments: argparse.Namespace, chunk: str) -> dict[str, Any]:
    source = np.random.default_rng(0)
    with BatchGenerator.open(
        arguments.bundle,
        mode=arguments.mode,
        slots=arguments.streams + 1,
        prefill_chunk=None if chunk == "auto" else int(chunk),
        threads=arguments.threads,
    ) as generator:
        endless = SamplingParams(max_new_tokens=None, ignore_eos=True)
        for _ in range(arguments.streams):
            generator.submit(source.integers(0, 1000, 32).tolist(), endless)
        times: dict[int, list[float]] = {}

        def step() -> None:
            events, now = generator.step(), perf_counter()
            for event in events:
                times.setdefault(event.request_id, []).append(now)

        for _ in range(arguments.streams + SETTLING):
            step()
        calm = perf_counter()
        for _ in range(BEFORE):
            step()
        came = perf_counter()
        long = generator.submit(source.integers(0, 1000, arguments.prompt).tolist(), SamplingParams(2, ignore_eos=True))
        while not long.done:
            step()
        read = perf_counter()
        times.pop(long.request_id, None)
    before, during = gaps_of(times, calm, came), gaps_of(times, came, read)
    return {
        "chunk": chunk,
        "median_before_s": float(np.median(before)),
        "p99_before_s": float(np.percentile(before, 99)),
        "median_during_s": float(np.median(during)),
        "p99_during_s": float(np.percentile(during, 99)),
        "p99_during_to_median_during": float(np.percentile(during, 99) / np.median(during)),
        "p99_during_to_median_before": float(np.percentile(during, 99) / np.median(before)),
        "prompt_tokens_per_second": arguments.prompt / (read - came),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--streams", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=2000, help="tokens of the long prompt")
    parser.add_argument("--chunks", nargs="+", default=["auto", "64", "16"], help="tokens, or auto")
    parser.add_argument("--mode", default="plain")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="write the result here, too")
    arguments = parser.parse_args()
    cells = []
    for chunk in arguments.chunks:
        cell = measure(arguments, chunk)
        cells.append(cell)
        print(
            f"chunk {chunk:>4}: between tokens {1e3 * cell['median_before_s']:.1f} ms before; while the prompt is read "
            f"{1e3 * cell['median_during_s']:.1f} ms (median), {1e3 * cell['p99_during_s']:.1f} ms (99 %), "
            f"{cell['p99_during_to_median_before']:.2f}x of before; "
            f"{cell['prompt_tokens_per_second']:.0f} prompt tokens/s",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps({"streams": arguments.streams, "cells": cells}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
