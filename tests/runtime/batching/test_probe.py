"""Measuring rounds of a batch."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.engines.profile_device import probe_device
from dspark_edge.runtime.batching.probe import BatchProbe
from dspark_edge.runtime.profiling import plan_profile, profile_engine

from ...conftest import runs_lowering


@pytest.mark.parametrize(("lowering", "calls"), [("ort", 3), ("decomposed", 1)])
def test_a_round_is_measured_as_it_is_decoded(lowering: str, calls: int) -> None:
    """With a clock that advances by 1 whenever it is read: a sampler's run takes 1, so there are as many as it says."""
    if not runs_lowering(lowering, "dspark"):
        pytest.skip("this ONNX Runtime is too old for the lowering")
    path = Path(__file__).parents[2] / "data" / "bundles" / f"qwen3_rnn_{lowering}"
    ticks = count()
    with OnnxRuntimeEngine(Bundle.open(path), threads=1) as engine:
        probe = BatchProbe(engine, 3, 64, lambda: float(next(ticks)))
        wide = probe.run(20, 8, "sampler_greedy")
        plain = probe.run(50, 1, "sampler")
    assert (probe.batch, wide.draft_s, wide.sampler_s) == (3, 1.0, calls)
    assert (plain.draft_s, plain.sampler_s) == (None, 1.0)


def test_a_profile_takes_batches(bundle_dir: Path) -> None:
    bundle = Bundle.open(bundle_dir)
    with OnnxRuntimeEngine(bundle, threads=1) as engine:
        plan = plan_profile(bundle.manifest, widths=(1, 8), contexts=(10,), batches=(2,), budget_s=0.01)
        profile = profile_engine(engine, plan, probe_device("cpu", 1), make_probe=BatchProbe)
    shared = (1,) if bundle.manifest.lowering == "ort" else (1, 8)
    expected = {(1, 1), (1, 8), *((2, width) for width in shared)}
    assert {(point.batch, point.width) for point in profile.points["target"]} == expected
    assert profile.target_s(2, 8, 10) > 0
