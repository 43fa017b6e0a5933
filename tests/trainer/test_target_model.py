"""The target in torch against the reference records, and its ways through the layers against each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="running a target in torch needs the [train] extra")

import torch
from safetensors.torch import load_file

from dspark_edge.engines.errors import CheckpointError, InvalidInputError
from dspark_edge.trainer import target_model
from dspark_edge.trainer.memory import available_memory, format_bytes, peak_memory
from dspark_edge.trainer.target_model import TargetModel
from tests.exporter.conftest import write_target

pytestmark = pytest.mark.needs_export

PAIRS = (("qwen3_target", "qwen3_rnn"), ("llama_target", "llama_vanilla"))
POSITIONS = 128


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: pair[0])
def pair(request: pytest.FixtureRequest, reference_dir: Path) -> tuple[TargetModel, Path]:
    """A reference target, and the folder of a record of it."""
    name, drafter = request.param
    return TargetModel.load(reference_dir / name, POSITIONS), reference_dir / drafter


def prompts_of(folder: Path, count: int) -> list[torch.Tensor]:
    record = json.loads((folder / "reference.json").read_text())
    return [torch.tensor(sample["prompt"]) for sample in record["samples"][:count]]


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, S], padded behind with a token that occurs, and lengths [B]."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=101)
    return ids, torch.tensor([len(row) for row in rows])


def test_features_and_logits_are_the_recorded_ones(pair: tuple[TargetModel, Path]) -> None:
    target, folder = pair
    recorded = load_file(folder / "reference.safetensors")
    taps = json.loads((folder / "config.json").read_text())["target_layer_ids"]
    ids, lengths = padded(prompts_of(folder, 2))
    features, hidden = target.features(ids, taps)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(features[row, :length], recorded[f"p{row}.features"], atol=1e-4, rtol=1e-4)
        last = target.logits(hidden[row, length - 1])
        torch.testing.assert_close(last, recorded[f"p{row}.target_logits_last"], atol=1e-4, rtol=1e-4)


def test_taps_come_in_the_order_asked_for(pair: tuple[TargetModel, Path]) -> None:
    target, folder = pair
    (ids,) = prompts_of(folder, 1)
    size = target.config.hidden_size
    features, hidden = target.features(ids[None], (2, -1, 0))
    assert torch.equal(features[..., size : 2 * size], target.embedding[ids][None])
    assert torch.equal(features[..., :size], target.features(ids[None], (2,))[0])
    nothing, same = target.features(ids[None], ())
    assert nothing.shape == (1, len(ids), 0) and torch.equal(same, hidden)


def test_a_batch_is_its_sequences_one_by_one(pair: tuple[TargetModel, Path]) -> None:
    target, folder = pair
    rows = prompts_of(folder, 4)
    ids, lengths = padded(rows)
    features, hidden = target.features(ids, (0, 4))
    cache = target.allocate(4, 70)
    logits = target.prefill(ids, lengths, cache, 0)
    for row, alone in enumerate(rows):
        own, own_hidden = target.features(alone[None], (0, 4))
        torch.testing.assert_close(features[row, : len(alone)], own[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(hidden[row, : len(alone)], own_hidden[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(logits[row], target.logits(own_hidden[0, -1]), atol=1e-4, rtol=1e-4)


def expect_steps(target: TargetModel, rows: list[torch.Tensor], prefilled: list[int]) -> None:
    """Prefill of a part and steps over the rest give the logits that the whole sequences have."""
    ids, lengths = padded([row[:count] for row, count in zip(rows, prefilled, strict=True)])
    ends = torch.tensor([len(row) for row in rows])
    cache = target.allocate(len(rows), int(ends.max()) + 1)
    for buffer in (*cache.keys, *cache.values):
        buffer.fill_(7.0)  # what lies behind the valid length must not matter
    # In two parts: each fills rows of its own.
    first = target.prefill(ids[:1, : prefilled[0]], lengths[:1], cache, 0)
    logits = torch.cat([first, target.prefill(ids[1:], lengths[1:], cache, 1)])
    wanted = [target.logits(target.features(row[None], ())[1][0]) for row in rows]
    while True:
        for row, position in enumerate(cache.lengths.tolist()):
            torch.testing.assert_close(logits[row], wanted[row][position - 1], atol=1e-4, rtol=1e-4)
        going = cache.lengths < ends
        if not going.any():
            return
        places = torch.minimum(cache.lengths, ends - 1).tolist()
        tokens = torch.stack([row[place] for row, place in zip(rows, places, strict=True)])
        logits = torch.where(going[:, None], target.step(tokens, cache), logits)
        cache.lengths += going  # rows that are through stay where they are


def test_steps_go_on_from_a_prefill(pair: tuple[TargetModel, Path]) -> None:
    target, folder = pair
    rows = prompts_of(folder, 4)
    expect_steps(target, rows, [3, 15, 36, 60])


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Qwen3ForCausalLM", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
        ("LlamaForCausalLM", {"num_key_value_heads": 4}),
        ("LlamaForCausalLM", {"attention_bias": True, "num_hidden_layers": 2}),
    ],
    ids=["one-key-head", "no-groups", "biases"],
)
def test_other_shapes_step_as_they_run(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    target = TargetModel.load(write_target(tmp_path / "target", architecture, **changes), 32)
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 260, (length,), generator=random) for length in (5, 9, 12)]
    expect_steps(target, rows, [5, 7, 8])
    # The exporter's module, which is compared with transformers, is the same model.
    config, ids = target.config, rows[2][None]
    past = [torch.zeros(1, config.num_key_value_heads, 32, config.head_dim) for _ in range(2 * config.num_layers)]
    with torch.no_grad():
        expected, _, _ = target.module(ids, torch.tensor([0]), torch.arange(12)[None], past, [])
    torch.testing.assert_close(target.logits(target.features(ids, ())[1]), expected, atol=1e-4, rtol=1e-4)


def test_kept_rows_go_on_alone(pair: tuple[TargetModel, Path]) -> None:
    target, folder = pair
    rows = prompts_of(folder, 3)
    ids, lengths = padded(rows)
    cache, other = target.allocate(3, 64), target.allocate(3, 64)
    for each in (cache, other):
        target.prefill(ids, lengths, each, 0)
    tokens = torch.tensor([100, 101, 102])
    whole = target.step(tokens, cache)
    other.keep(torch.tensor([2, 0]))
    assert other.lengths.tolist() == [40, 3] and other.keys[0].shape[0] == other.values[-1].shape[0] == 2
    torch.testing.assert_close(target.step(tokens[[2, 0]], other), whole[[2, 0]], atol=1e-5, rtol=1e-5)


def test_a_target_in_another_type(reference_dir: Path) -> None:
    exact = TargetModel.load(reference_dir / "qwen3_target", 32)
    rough = TargetModel.load(reference_dir / "qwen3_target", 32, "cpu", torch.bfloat16)
    ids = torch.tensor([[104, 101, 114]])
    features, hidden = rough.features(ids, (0,))
    assert features.dtype == rough.dtype == torch.bfloat16 and rough.logits(hidden).dtype == torch.float32
    assert rough.allocate(1, 4).keys[0].dtype == torch.bfloat16
    error = (rough.logits(hidden) - exact.logits(exact.features(ids, (0,))[1])).abs().max()
    assert 0 < error < 1
    assert exact.fingerprint() != rough.fingerprint()


def test_a_target_is_frozen_and_has_a_fingerprint(tmp_path: Path, reference_dir: Path) -> None:
    target = TargetModel.load(reference_dir / "qwen3_target", 32)
    assert not any(parameter.requires_grad for parameter in target.module.parameters())
    assert target.head is target.embedding
    prints = [
        TargetModel.load(write_target(tmp_path / f"{seed}-{name}", seed=seed), 16).fingerprint()
        for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    ]
    assert prints[0] == prints[1] != prints[2] and len(prints[0]) == 16


def test_a_target_too_large_for_memory_says_how_much_it_needs(
    reference_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target_model, "available_memory", lambda device: 2_000_000)
    with pytest.raises(InvalidInputError) as caught:
        TargetModel.load(reference_dir / "qwen3_target", POSITIONS)
    # 616,224 parameters and the rotary tables, in fp32.
    assert "weights need 2.5 MB in float32, 2.0 MB are free on cpu" in str(caught.value)
    assert "\n" not in str(caught.value)
    half = TargetModel.load(reference_dir / "qwen3_target", POSITIONS, dtype=torch.bfloat16)
    # 2 · 6 layers · 100 sequences · 2 heads · 1000 slots · 16 · 2 bytes
    with pytest.raises(InvalidInputError, match=r"100 sequences of 1000 tokens need 76\.8 MB, 2\.0 MB are free on cpu"):
        half.allocate(100, 1000)
    assert half.allocate(2, 16).lengths.tolist() == [0, 0]


def test_a_target_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        TargetModel.load(tmp_path / "missing", 16)


def test_memory_is_told() -> None:
    assert available_memory(torch.device("cpu")) > 0 and peak_memory(torch.device("cpu")) > 1_000_000
    sizes = (0, 999, 1536, 2_471_976, 8e9, 1.5e12, 38e12)
    assert [format_bytes(size) for size in sizes] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "8.0 GB",
        "1.5 TB",
        "38.0 TB",
    ]
