"""benchmarks/gpu.py on an emulated device: everything is measured, shown and drawn. Its times mean nothing."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import gpu
import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.tensorrt.engine import TensorRTEngine
from dspark_edge.engines.tensorrt.profiles import BuildSizes
from tests.engines.emulated_gpu import emulate


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TensorRTEngine:
    kept = Path(__file__).parents[1] / "data" / "bundles" / "qwen3_rnn_decomposed"
    bundle = Bundle.open(shutil.copytree(kept, tmp_path / "bundle"))
    flavour, cuda, _ = emulate(bundle, BuildSizes(1, 64, (1, 2, 3, 4, 5, 6, 7, 8)))
    monkeypatch.setattr(gpu, "_COPY", 1 << 20)
    return TensorRTEngine(bundle, "tensorrt-rtx", flavour, cuda)


def test_everything_is_measured(engine: TensorRTEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = engine.bundle.manifest.drafter.block_size
    with engine:
        report = gpu.measure(engine, None, argparse.Namespace(context=64, tokens=12, repeats=1))
    assert len(report["calls_s"]) == block + 3 and all(seconds == 0.0005 for seconds in report["calls_s"].values())
    assert report["ratios"]["verify_to_plain"] == 1 and report["ratios"]["draft_to_plain"] == 1
    assert report["bandwidth"]["copy_bytes_per_s"] == pytest.approx(2 * (1 << 20) / 0.0005)
    # Calls of a round: drafter, target, sampler; a plain step has no drafter.
    assert report["rounds"]["static"]["device_s"] == pytest.approx(0.0015)
    assert report["rounds"]["plain"]["device_s"] == pytest.approx(0.001)
    assert report["modes"]["plain"]["to_plain"] == 1 and report["modes"]["static"]["accepted_length"] >= 1
    json.dumps(report)
    gpu.show(report)
    shown = capsys.readouterr().out
    assert "verify_to_plain" in shown and "tokens/s" in shown
    pytest.importorskip("matplotlib")
    gpu.draw(report, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_read_a_token(engine: TensorRTEngine) -> None:
    stored = {record.path: record.size for record in engine.bundle.manifest.files}
    weights = stored["target.onnx"] + stored.get("target.onnx.data", 0)
    facts = engine.bundle.manifest.target
    cached = 2 * 4 * facts.num_layers * facts.num_key_value_heads * facts.head_dim
    assert gpu.read_a_token(engine.bundle, 100) == weights + 100 * cached


def test_a_machine_without_a_gpu_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("Error: ")
