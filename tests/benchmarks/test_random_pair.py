"""benchmarks/random_pair.py: a pair of random weights that can be exported."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="exporting needs the [export] extra")
pytest.importorskip("transformers", reason="the target is drawn by transformers")

import random_pair
import torch

from dspark_edge.exporter.pair import check_weights, open_pair


def test_a_random_pair_fits(tmp_path: Path) -> None:
    assert random_pair.main([str(tmp_path), "--shape", "tiny", "--layers", "2", "--block-size", "5"]) == 0
    with ExitStack() as stack:
        pair = open_pair(stack, tmp_path / "target", tmp_path / "drafter")
        check_weights(pair, 64, 16, torch.float32)
        assert pair.target_config.num_layers == 4
        assert pair.drafter_config is not None and pair.drafter_config.block_size == 5
        assert pair.drafter_config.backbone.num_layers == 2
    assert torch.get_default_dtype() == torch.float32
