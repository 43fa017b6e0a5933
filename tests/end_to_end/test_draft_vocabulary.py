"""A drafter with a draft vocabulary changes what is drafted, and nothing of what is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.runtime import Generator, SamplingParams
from dspark_edge.runtime.model import ModelDrafter
from tests.conftest import runs_lowering

pytestmark = pytest.mark.needs_export

# Of the reference pairs' bytes: all that their texts have, and the same without some common letters.
TEXT = frozenset(range(256))
SCARCE = frozenset(range(97, 123)) - frozenset(b"aeo")


@pytest.fixture(scope="module")
def restricted(
    tmp_path_factory: pytest.TempPathFactory, export_once: Callable[..., Path], reference_dir: Path
) -> Callable[[str, str, frozenset[int]], Path]:
    """`restricted(drafter, lowering, tokens)`: the bundle of a reference pair whose drafter drafts only these tokens.

    The drafter brings no copies of the target's embedding and head.
    """
    load_file = pytest.importorskip("safetensors.torch").load_file
    from safetensors.torch import save_file

    def make(drafter: str, lowering: str, tokens: frozenset[int]) -> Path:
        if not runs_lowering(lowering, "dspark"):
            pytest.skip(f"this ONNX Runtime is too old for the lowering {lowering!r}")
        folder = tmp_path_factory.mktemp(drafter)
        config = json.loads((reference_dir / drafter / "config.json").read_text())
        weights: dict[str, Any] = load_file(reference_dir / drafter / "model.safetensors")
        weights = {name: weights[name] for name in weights.keys() - {"embed_tokens.weight", "lm_head.weight"}}
        ids = weights["markov_head.markov_w2.weight"].new_tensor(sorted(tokens)).long()
        weights["draft_vocab_ids"] = ids
        weights["markov_head.markov_w2.weight"] = weights["markov_head.markov_w2.weight"][ids]
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, "draft_vocab_size": len(tokens)}))
        name = f"{drafter}-{len(tokens)}-{lowering}"
        return export_once(name, reference_dir / "qwen3_target", folder, lowering=lowering, capacity=512)

    return make


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every token that is drafted during the test."""
    drafted: list[int] = []
    draft = ModelDrafter.draft

    def record(*given: Any) -> Any:
        block = draft(*given)
        drafted.extend(block.token_ids)
        return block

    monkeypatch.setattr(ModelDrafter, "draft", record)
    return drafted


def accepted_lengths(path: Path, record: Any) -> list[list[int]]:
    """Of every recorded sample, whose tokens must come out."""
    params = SamplingParams(max_new_tokens=record["max_new_tokens"] + 1, ignore_eos=True)
    lengths = []
    with Generator.open(path, threads=1) as generator:
        for sample in record["samples"]:
            answer = generator.generate(sample["prompt"], params)
            assert [*sample["prompt"], *answer.token_ids[:-1]] == sample["output"]
            lengths.append(list(answer.statistics.accepted_lengths))
    return lengths


@pytest.mark.parametrize(("drafter", "lowering"), [("qwen3_vanilla", "ort"), ("qwen3_rnn", "decomposed")])
def test_what_is_said_stays_the_same(
    restricted: Callable[..., Path], reference_dir: Path, drafts: list[int], drafter: str, lowering: str
) -> None:
    record = json.loads((reference_dir / drafter / "reference.json").read_text())
    recorded = [sample["acceptance_lengths"] for sample in record["samples"]]
    # Every token that the texts have can be drafted: round by round as if there were no draft vocabulary.
    path = restricted(drafter, lowering, TEXT)
    assert Bundle.open(path).manifest.drafter.draft_vocab_size == len(TEXT)
    assert accepted_lengths(path, record) == recorded
    drafts.clear()
    # Without some common letters: the same texts, of shorter drafts.
    scarce = accepted_lengths(restricted(drafter, lowering, SCARCE), record)
    assert sum(map(len, scarce)) > sum(map(len, recorded))
    assert max(map(max, scarce)) > 1, "no draft was ever accepted: nothing was tested"
    assert drafts and SCARCE.issuperset(drafts)


def test_drawn_texts_repeat_and_draft_from_the_set(restricted: Callable[..., Path], drafts: list[int]) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=1.0, top_p=0.95, seed=3, ignore_eos=True)
    prompt = [int(byte) for byte in b"the cat sat on"]
    with Generator.open(restricted("qwen3_vanilla", "ort", SCARCE), threads=1) as generator:
        first, second = generator.generate(prompt, params), generator.generate(prompt, params)
    assert first.token_ids == second.token_ids
    assert set(first.token_ids) - SCARCE, "the target draws tokens that are never drafted"
    assert drafts and SCARCE.issuperset(drafts)
