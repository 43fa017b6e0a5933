"""Every reference pair, with every lowering: the graphs draft what DeepSpec's own code drafted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.exporter.graph_runner import GraphRunner
from dspark_edge.exporter.lowerings import LOWERINGS
from dspark_edge.exporter.pair import open_pair
from dspark_edge.exporter.weights import load_module

PAIRS = (
    ("qwen3_target", "qwen3_vanilla"),
    ("qwen3_target", "qwen3_rnn"),
    ("qwen3_target", "qwen3_dflash"),
    ("llama_target", "llama_vanilla"),
)
TOLERANCE = 1e-4


def record_of(folder: Path) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    samples: list[dict[str, Any]] = json.loads((folder / "reference.json").read_text())["samples"]
    return samples, load_file(folder / "reference.safetensors")


def error(given: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(given) - expected).max())


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(("target", "drafter"), PAIRS, ids=[drafter for _, drafter in PAIRS])
def test_rounds_as_recorded(
    target: str, drafter: str, lowering: str, reference_bundle: Callable[..., Path], reference_dir: Path
) -> None:
    bundle = Bundle.open(reference_bundle(target, drafter, lowering))
    samples, tensors = record_of(reference_dir / drafter)
    facts = bundle.manifest.drafter
    noise = np.zeros((1, facts.block_size, facts.candidates), np.float32)
    compared = 0
    with OnnxRuntimeEngine(bundle, threads=1) as engine:
        for number, sample in enumerate(samples):
            runner = GraphRunner(engine, 256)
            output = np.array([sample["output"]])
            for index, recorded in enumerate(sample["rounds"]):
                # The tokens that the last round committed, up to this round's anchor.
                logits = runner.extend(output[:, int(runner.lengths[0]) : recorded["start"]])
                given = runner.draft(np.array([recorded["anchor"]]), 0.0, noise)
                assert given["draft_ids"][0].tolist() == recorded["verify_ids"][1:], (number, index)
                assert logits[0, -1].argmax() == recorded["anchor"]
                prefix = f"p{number}.r{index}"
                if index == 0 and f"p{number}.target_logits_last" in tensors:
                    assert error(logits[0, -1], tensors[f"p{number}.target_logits_last"]) <= TOLERANCE
                for name in ("base_logits", "confidence_logits"):
                    if f"{prefix}.{name}" in tensors and name in given:
                        assert error(given[name][0], tensors[f"{prefix}.{name}"]) <= TOLERANCE
                        compared += 1
    assert compared == (12 if facts.confidence else 6)  # 2 samples, 3 rounds


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


@pytest.mark.parametrize(("target", "drafter"), PAIRS, ids=[drafter for _, drafter in PAIRS])
def test_features_and_hidden_rows_as_recorded(target: str, drafter: str, reference_dir: Path, stack: ExitStack) -> None:
    samples, tensors = record_of(reference_dir / drafter)
    pair = open_pair(stack, reference_dir / target, reference_dir / drafter)
    assert pair.drafter_config is not None
    with torch.device("meta"):
        modules = pair.build_target(128, torch.float32), pair.build_drafter(128, 8, None, torch.float32)
    load_module(modules[0], pair.target_sources(128))
    load_module(modules[1], pair.drafter_sources(128))
    seen: dict[str, torch.Tensor] = {}
    modules[0].context.register_forward_pre_hook(lambda _, given: seen.update(features=given[0]))
    modules[1].norm.register_forward_hook(lambda _, given, result: seen.update(hidden=result))

    config, backbone = pair.target_config, pair.drafter_config.backbone
    for number in (0, 1):
        prompt, first = samples[number]["prompt"], samples[number]["rounds"][0]
        past = [torch.zeros(1, config.num_key_value_heads, 128, config.head_dim)] * (2 * config.num_layers)
        context = [torch.zeros(1, backbone.num_key_value_heads, 128, backbone.head_dim)] * (2 * backbone.num_layers)
        with torch.no_grad():
            last = torch.tensor([[len(prompt) - 1]])
            _, _, context = modules[0](torch.tensor([prompt]), torch.tensor([0]), last, past, context)
            noise = torch.zeros(1, pair.drafter_config.block_size, 8)
            start, anchor = torch.tensor([first["start"]]), torch.tensor([first["anchor"]])
            modules[1](anchor, start, torch.zeros(1), noise, context)
        assert error(seen["features"][0], tensors[f"p{number}.features"]) <= TOLERANCE
        assert error(seen["hidden"][0], tensors[f"p{number}.r0.block_hidden"]) <= TOLERANCE
