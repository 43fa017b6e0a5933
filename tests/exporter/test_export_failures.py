"""Bad input to an export: one clear line, and nothing left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dspark_edge.engines.errors import BundleError, CheckpointError, DSparkError, InvalidInputError, MismatchError
from dspark_edge.exporter.export import ExportOptions, export_bundle

Checkpoint = Callable[..., Path]


class Pair:
    """A target and a drafter that can be spoiled, and where their bundle would go."""

    def __init__(self, folder: Path, make_target: Checkpoint, make_drafter: Checkpoint) -> None:
        self.target = make_target(folder / "target")
        self.drafter = make_drafter(folder / "drafter", self.target)
        self.output = folder / "bundles" / "bundle"
        self.output.parent.mkdir()

    def configure(self, which: Path, **changes: Any) -> None:
        path = which / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def replace(self, which: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        path = which / "model.safetensors"
        weights = load_file(path)
        tensor = weights.pop(name)
        if change is not None:
            weights[name] = change(tensor).contiguous()
        save_file(weights, path)

    def refusal(self, kind: type[DSparkError], options: ExportOptions | None = None, **more: Any) -> str:
        """The message of the error that the export ends with."""
        before = sorted(os.listdir(self.output.parent))
        with pytest.raises(kind) as caught:
            export_bundle(self.target, more.pop("drafter", self.drafter), self.output, options, **more)
        message = str(caught.value)
        assert message and "\n" not in message
        assert sorted(os.listdir(self.output.parent)) == before
        return message


@pytest.fixture
def pair(tmp_path: Path, make_target: Checkpoint, make_drafter: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Pair:
    made = Pair(tmp_path, make_target, make_drafter)

    def not_reached(*_: object) -> None:
        raise AssertionError("bad input is found before any graph is traced")

    monkeypatch.setattr("dspark_edge.exporter.graphs.trace", not_reached)
    return made


@pytest.mark.parametrize("which", ["target", "drafter"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: is not valid JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda folder: os.truncate(folder / "model.safetensors", 50_000), "is truncated or damaged"),
        (lambda folder: os.truncate(folder / "model.safetensors", 3), "is truncated or damaged"),
        (lambda folder: os.rename(folder, folder.with_name("elsewhere")), "no such file or directory"),
    ],
    ids=["no-config", "half-config", "no-weights", "truncated-weights", "no-header", "no-folder"],
)
def test_missing_and_damaged_files(which: str, spoil: Callable[[Path], object], message: str, pair: Pair) -> None:
    folder: Path = getattr(pair, which)
    spoil(folder)
    given = pair.refusal(CheckpointError)
    assert message in given and str(folder) in given


@pytest.mark.parametrize(
    ("which", "changes", "kind", "message"),
    [
        ("target", {"architectures": ["MambaForCausalLM"]}, CheckpointError, "no supported target architecture"),
        ("drafter", {"architectures": ["EagleModel"]}, CheckpointError, "no supported drafter architecture"),
        ("drafter", {"vocab_size": 300}, MismatchError, "vocabulary size 300, the target has 260"),
        ("drafter", {"hidden_size": 64}, MismatchError, "hidden size 64, the target has 32"),
        ("drafter", {"num_target_layers": 5}, MismatchError, "number of target layers 5, the target has 4"),
        ("drafter", {"target_layer_ids": [0, 7]}, MismatchError, "taps target layer 7"),
        ("drafter", {"target_layer_ids": [0, 3]}, MismatchError, "the last layer (3) cannot be tapped"),
        ("drafter", {"target_layer_ids": [-2, 1]}, MismatchError, "taps target layer -2"),
        ("drafter", {"target_layer_ids": [0, 1, 2]}, CheckpointError, "fc.weight has shape [32, 64]"),
        ("target", {"rope_scaling": {"rope_type": "yarn"}}, CheckpointError, "rope scaling 'yarn' is not supported"),
        ("drafter", {"rope_scaling": {"rope_type": "longrope"}}, CheckpointError, "'longrope' is not supported"),
        ("target", {"num_hidden_layers": 5}, MismatchError, "number of target layers 4, the target has 5"),
        ("drafter", {"num_hidden_layers": 3}, CheckpointError, "has no tensor 'layers.2."),
        ("target", {"tie_word_embeddings": False}, CheckpointError, "has no tensor 'lm_head.weight'"),
        ("target", {"attention_bias": True}, CheckpointError, "has no tensor 'model.layers.0.self_attn.q_proj.bias'"),
        ("target", {"intermediate_size": 40}, CheckpointError, "config.json asks for [80, 32]"),
        ("drafter", {"markov_head_type": "rnn"}, CheckpointError, "has no tensor 'markov_head.joint_proj.weight'"),
        ("drafter", {"markov_rank": 4}, CheckpointError, "markov_head.markov_w1.weight has shape [260, 8]"),
        ("drafter", {"confidence_head_with_markov": False}, CheckpointError, "confidence_head.proj.weight has shape"),
        ("drafter", {"mask_token_id": 260}, CheckpointError, "outside the vocabulary"),
        ("drafter", {"draft_vocab_size": 300}, CheckpointError, "more than the vocabulary of 260"),
        ("drafter", {"draft_vocab_size": 40}, CheckpointError, "has no tensor 'draft_vocab_ids'"),
    ],
)
def test_configurations_that_do_not_fit(
    which: str, changes: dict[str, Any], kind: type[DSparkError], message: str, pair: Pair
) -> None:
    pair.configure(getattr(pair, which), **changes)
    assert message in pair.refusal(kind)


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("target", "model.norm.weight"),
        ("target", "model.layers.3.mlp.down_proj.weight"),
        ("drafter", "fc.weight"),
        ("drafter", "layers.1.self_attn.k_norm.weight"),
        ("drafter", "markov_head.markov_w2.weight"),
        ("drafter", "confidence_head.proj.bias"),
    ],
)
def test_missing_and_misshapen_tensors(which: str, name: str, pair: Pair) -> None:
    folder: Path = getattr(pair, which)
    pair.replace(folder, name, lambda tensor: torch.cat([tensor, tensor]))
    assert name in pair.refusal(CheckpointError)
    pair.replace(folder, name, None)
    assert f"has no tensor '{name}'" in pair.refusal(CheckpointError)


@pytest.fixture
def drafting_pair(pair: Pair, tmp_path: Path, make_drafter: Checkpoint) -> Pair:
    """A pair with a draft vocabulary of 40 tokens."""
    pair.drafter = make_drafter(tmp_path / "drafting", pair.target, draft_vocab_size=40)
    return pair


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "has no tensor 'draft_vocab_ids'"),
        (lambda ids: ids[:39], "draft_vocab_ids has shape [39], config.json asks for [40]"),
        (lambda ids: ids[:, None], "draft_vocab_ids has shape [40, 1], config.json asks for [40]"),
        (lambda ids: ids.float(), "'draft_vocab_ids' is of type F32, expected I64"),
        (lambda ids: ids.int(), "'draft_vocab_ids' is of type I32"),
        (lambda ids: ids.flip(0), "draft_vocab_ids is not strictly increasing: "),
        (lambda ids: ids.index_fill(0, torch.tensor([7]), int(ids[6])), "is not strictly increasing: "),
        (lambda ids: ids.index_fill(0, torch.tensor([39]), 260), "holds 260, outside the vocabulary of 260"),
        (lambda ids: ids.index_fill(0, torch.tensor([0]), -1), "holds -1, outside the vocabulary of 260"),
    ],
    ids=["missing", "short", "matrix", "float", "int32", "descending", "twice", "too-large", "negative"],
)
def test_draft_vocabularies_that_cannot_be(
    change: Callable[[torch.Tensor], torch.Tensor] | None, message: str, drafting_pair: Pair
) -> None:
    drafting_pair.replace(drafting_pair.drafter, "draft_vocab_ids", change)
    given = drafting_pair.refusal(CheckpointError)
    assert message in given and str(drafting_pair.drafter) in given


def test_a_markov_bias_on_other_tokens_than_the_draft_vocabulary(drafting_pair: Pair) -> None:
    drafter = drafting_pair.drafter
    drafting_pair.replace(drafter, "markov_head.markov_w2.weight", lambda rows: torch.cat([rows] * 7)[:260])
    expected = "markov_head.markov_w2.weight has shape [260, 8], config.json asks for [40, 8]"
    assert expected in drafting_pair.refusal(CheckpointError)


def test_a_head_that_brings_only_the_draft_vocabulary(drafting_pair: Pair) -> None:
    drafting_pair.replace(drafting_pair.drafter, "lm_head.weight", lambda head: head[:40])
    assert "lm_head.weight is [40, 32] in the drafter, [260, 32]" in drafting_pair.refusal(MismatchError)


def test_a_drafter_of_another_target(pair: Pair) -> None:
    pair.replace(pair.drafter, "embed_tokens.weight", lambda tensor: tensor * 1.1)
    assert "embed_tokens.weight differs in 260 of 260 rows" in pair.refusal(MismatchError)
    pair.replace(pair.drafter, "embed_tokens.weight", lambda tensor: tensor[:200])
    assert "embed_tokens.weight is [200, 32] in the drafter, [260, 32]" in pair.refusal(MismatchError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 257}, "capacity is 257, but the target was made for 256 positions"),
        ({"capacity": 6}, "capacity is 6, expected more than a block of 5 tokens"),
    ],
)
def test_capacities_that_do_not_fit(options: dict[str, Any], message: str, pair: Pair) -> None:
    assert message in pair.refusal(InvalidInputError, ExportOptions(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 2}, "the 'ort' lowering runs one sequence at a time; for a max_batch of 2 choose"),
        ({"lowering": "tensorrt"}, "unknown lowering 'tensorrt'"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; choose one of: fp32, fp16, bf16"),
        ({"capacity": 0}, "capacity is 0, expected at least 1"),
        ({"max_batch": 0}, "max_batch is 0"),
        ({"candidates": 0}, "candidates is 0"),
        ({"candidates": 64, "candidate_pool": 32}, "candidate_pool is 32, expected at least the 64 candidates"),
        ({"ngram_block_size": -1}, "ngram_block_size is -1"),
        ({"packed_sequences": 1}, "packed_sequences is 1, expected 0 or at least 2"),
        (
            {"packed_sequences": 2, "lowering": "onnx"},
            "packed_sequences is given, but the 'onnx' lowering verifies batches as it is",
        ),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ExportOptions(**options)


def test_an_output_that_is_taken(pair: Pair) -> None:
    pair.output.mkdir()
    (pair.output / "notes.txt").write_text("mine")
    for overwrite in (False, True):  # only ever a bundle is replaced
        assert str(pair.output) in pair.refusal(BundleError, overwrite=overwrite)
    assert (pair.output / "notes.txt").read_text() == "mine"


def test_tokenizers_that_are_not_there(pair: Pair, tmp_path: Path) -> None:
    for source in (tmp_path / "nowhere", tmp_path):
        assert "no tokenizer.json there" in pair.refusal(InvalidInputError, tokenizer=source)


def test_a_broken_generation_config(pair: Pair) -> None:
    (pair.target / "generation_config.json").write_text("[1")
    assert "generation_config.json is not valid JSON" in pair.refusal(CheckpointError)


def test_a_drafter_by_a_name_that_is_neither_folder_nor_ngram(pair: Pair) -> None:
    assert "no such file or directory" in pair.refusal(CheckpointError, drafter="n-gram")


@pytest.mark.parametrize("stage", ["tracing", "writing weights"])
def test_an_interrupted_export(stage: str, reference_dir: Path, tmp_path: Path) -> None:
    """Ctrl-C leaves nothing behind, before any weight is written and in the middle of them."""
    output = tmp_path / "bundle"

    def interrupt(what: str, done: int, total: int) -> None:
        if what == stage and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_bundle(reference_dir / "llama_target", "ngram", output, report=interrupt)
    assert not list(tmp_path.iterdir())
