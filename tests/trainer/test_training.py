"""Training runs: that they learn, resume bit for bit, spread over processes, and refuse what they cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="training needs the [train] extra")

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dspark_edge.engines.errors import CheckpointError, InvalidInputError, MissingDependencyError
from dspark_edge.trainer.training.metrics_file import read_metrics
from dspark_edge.trainer.training.settings import DrafterSettings, TrainingSettings, automatic_taps
from dspark_edge.trainer.training.train import Listener, Resources, train_drafter

pytestmark = pytest.mark.needs_export

SHAPE = DrafterSettings(layers=1, block_size=4, taps=(0, 2), markov_rank=8)
QUICK = TrainingSettings(
    steps=12, batch=4, anchors=5, learning_rate=2e-3, warmup=2, held_out=0.2, evaluate_every=4, checkpoint_every=4
)
EXACT = Resources(device="cpu", compute_type="fp32", dtype="fp32")


@pytest.fixture(scope="module")
def responses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 responses of bytes that repeat themselves, greedy and not."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("responses") / "responses.jsonl"
    lines = []
    for number in range(40):
        word = random.integers(97, 105, size=int(random.integers(2, 5))).tolist()
        tokens = (word * 20)[: int(random.integers(12, 30))]
        entry = {
            "prompt": number,
            "domain": "test",
            "temperature": float(number % 2),
            "prompt_ids": tokens[:4],
            "response_ids": tokens[4:],
        }
        lines.append(json.dumps(entry) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture
def target(reference_dir: Path) -> Path:
    return reference_dir / "qwen3_target"


class Killed(Exception):
    """Stands for a kill: nothing is done after it."""


def killer(step: int) -> Listener:
    def listen(progress: Any) -> None:
        if progress.step == step:
            raise Killed

    return Listener(step=listen)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def without_times(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in entry.items() if key != "step_s"}
        for entry in read_metrics(folder / "metrics.jsonl")
    ]


def test_a_run_writes_a_drafter_its_metrics_and_a_plot(target: Path, responses: Path, tmp_path: Path) -> None:
    said: list[str] = []
    steps: list[int] = []
    listener = Listener(say=said.append, step=lambda progress: steps.append(progress.step))
    outcome = train_drafter(target, [responses], tmp_path / "d", SHAPE, QUICK, EXACT, listener)
    assert steps == list(range(1, 13))
    assert any("cache of" in line for line in said)
    assert any("peak memory" in line for line in said)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"]
    assert config["target_layer_ids"] == [0, 2]
    assert config["num_target_layers"] == 6
    stored = load_file(tmp_path / "d" / "model.safetensors")
    assert "markov_head.markov_w1.weight" in stored
    assert not {"embed_tokens.weight", "lm_head.weight"} & stored.keys()
    provenance = json.loads((tmp_path / "d" / "training.json").read_text())
    assert provenance["training"]["steps"] == 12
    assert str(tmp_path) not in json.dumps(provenance)
    entries = read_metrics(tmp_path / "d" / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "tau_greedy" in entry] == [4, 8, 12]
    assert entries[-1]["tau_greedy"] == outcome.tau_greedy
    assert entries[-1]["loss"] < entries[0]["loss"]
    assert (tmp_path / "d" / "training.png").read_bytes().startswith(b"\x89PNG")
    left = sorted(path.name for path in (tmp_path / "d").iterdir())
    assert left == ["config.json", "metrics.jsonl", "model.safetensors", "training.json", "training.png"]


def test_a_missing_matplotlib_is_told_before_anything_is_trained(
    target: Path, responses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match="matplotlib"):
        train_drafter(target, [responses], tmp_path / "d", SHAPE, QUICK, EXACT)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn", "none"])
def test_every_kind_of_head_learns_and_exports(target: Path, responses: Path, tmp_path: Path, head: str) -> None:
    from dspark_edge.exporter.export import ExportOptions, export_bundle
    from dspark_edge.runtime.generator import Generator
    from dspark_edge.runtime.sampling import SamplingParams

    shape = DrafterSettings(layers=1, block_size=3, taps=(-1, 4), markov_rank=8, head=head, draft_vocab=64)
    train_drafter(target, [responses], tmp_path / "d", shape, QUICK, Resources(device="cpu"))
    entries = read_metrics(tmp_path / "d" / "metrics.jsonl")
    assert entries[-1]["loss"] < entries[0]["loss"]
    if head in ("vanilla", "none"):  # all heads export in the exporter's own tests
        export_bundle(target, tmp_path / "d", tmp_path / "bundle", ExportOptions(capacity=64))
        texts = []
        for mode in ("plain", "static"):
            with Generator.open(tmp_path / "bundle", mode=mode) as generator:
                texts.append(generator.generate([104, 101, 114], SamplingParams(max_new_tokens=24)).token_ids)
        assert texts[0] == texts[1]


def test_a_confidence_head_is_trained_alone(target: Path, responses: Path, tmp_path: Path) -> None:
    shape = replace(SHAPE, draft_vocab=64)
    train_drafter(target, [responses], tmp_path / "whole", shape, QUICK, EXACT)
    only = replace(QUICK, warm_start=str(tmp_path / "whole"), only="confidence", learning_rate=0.05, divergence=0.0)
    train_drafter(target, [responses], tmp_path / "again", DrafterSettings(), only, EXACT)  # the shape is the drafter's
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert before.keys() == after.keys()
    for name in before:
        if name.startswith("confidence_head"):
            assert not torch.equal(before[name], after[name])
        else:
            torch.testing.assert_close(before[name], after[name], rtol=2e-3, atol=0)  # fc goes through its scale
    assert (tmp_path / "whole" / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()
    losses = [entry["confidence_loss"] for entry in read_metrics(tmp_path / "again" / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_a_confidence_head_learns_to_look_at_the_drafts_distribution(
    target: Path, responses: Path, tmp_path: Path
) -> None:
    """One that does not, as the reference's, gains the inputs; they count for nothing before it is trained."""
    blind = replace(SHAPE, confidence_draft_probs=False)
    train_drafter(target, [responses], tmp_path / "blind", blind, QUICK, EXACT)
    only = replace(QUICK, warm_start=str(tmp_path / "blind"), only="confidence", divergence=0.0)
    frozen = replace(only, learning_rate=1e-12)
    train_drafter(target, [responses], tmp_path / "same", DrafterSettings(), frozen, EXACT)
    train_drafter(target, [responses], tmp_path / "seeing", DrafterSettings(), replace(only, learning_rate=0.05), EXACT)
    configs, weights = {}, {}
    for name in ("blind", "same", "seeing"):
        configs[name] = json.loads((tmp_path / name / "config.json").read_text())
        weights[name] = load_file(tmp_path / name / "model.safetensors")["confidence_head.proj.weight"]
    assert "confidence_head_with_draft_probs" not in configs["blind"]
    assert configs["same"]["confidence_head_with_draft_probs"] is True
    assert weights["same"].shape[1] == weights["blind"].shape[1] + 3
    torch.testing.assert_close(weights["same"][:, :-3], weights["blind"])
    assert weights["same"][:, -3:].abs().max() < 1e-9 and weights["seeing"][:, -3:].abs().min() > 1e-3
    kept = DrafterSettings(confidence_draft_probs=False)
    train_drafter(target, [responses], tmp_path / "kept", kept, frozen, EXACT)
    assert load_file(tmp_path / "kept" / "model.safetensors")["confidence_head.proj.weight"].equal(weights["blind"])
    back = replace(only, warm_start=str(tmp_path / "seeing"))
    with pytest.raises(InvalidInputError, match="give a drafter whose confidence head sees the same"):
        train_drafter(target, [responses], tmp_path / "back", kept, back, EXACT)


def test_training_a_confidence_head_alone_needs_one(target: Path, responses: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="warm_start is 'recent', expected the drafter's folder whose conf"):
        TrainingSettings(only="confidence")
    with pytest.raises(InvalidInputError, match="only is 'head', expected one of: all, confidence"):
        TrainingSettings(only="head")
    train_drafter(target, [responses], tmp_path / "without", replace(SHAPE, confidence=False), QUICK, EXACT)
    only = replace(QUICK, warm_start=str(tmp_path / "without"), only="confidence")
    with pytest.raises(InvalidInputError, match="has no confidence head; there is nothing to train"):
        train_drafter(target, [responses], tmp_path / "again", SHAPE, only, EXACT)


@pytest.mark.parametrize("step", [1, 4, 7, 11])
def test_a_killed_run_goes_on_bit_for_bit(target: Path, responses: Path, tmp_path: Path, step: int) -> None:
    train_drafter(target, [responses], tmp_path / "whole", SHAPE, QUICK, EXACT)
    with pytest.raises(Killed):
        train_drafter(target, [responses], tmp_path / "d", SHAPE, QUICK, EXACT, killer(step))
    assert not (tmp_path / "d" / "model.safetensors").exists()
    heard: list[int] = []
    again = Listener(step=lambda progress: heard.append(progress.step))
    train_drafter(target, [responses], tmp_path / "d", SHAPE, QUICK, EXACT, again)
    assert heard[0] == step // 4 * 4 + 1  # one checkpoint interval is lost at most
    assert weights(tmp_path / "d") == weights(tmp_path / "whole")
    assert without_times(tmp_path / "d") == without_times(tmp_path / "whole")


def test_other_settings_do_not_go_on_with_a_run(target: Path, responses: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_drafter(target, [responses], tmp_path / "d", SHAPE, QUICK, EXACT, killer(5))
    other = TrainingSettings(**{**_values(QUICK), "learning_rate": 1e-4})
    with pytest.raises(InvalidInputError, match="other settings"):
        train_drafter(target, [responses], tmp_path / "d", SHAPE, other, EXACT)
    train_drafter(target, [responses], tmp_path / "d", SHAPE, other, EXACT, overwrite=True)
    with pytest.raises(InvalidInputError, match="finished drafter"):
        train_drafter(target, [responses], tmp_path / "d", SHAPE, other, EXACT)


def test_in_bf16_it_learns_the_same_and_is_another_run(target: Path, responses: Path, tmp_path: Path) -> None:
    rough = replace(EXACT, compute_type="bf16")
    exact = train_drafter(target, [responses], tmp_path / "exact", SHAPE, QUICK, EXACT)
    with pytest.raises(Killed):
        train_drafter(target, [responses], tmp_path / "rough", SHAPE, QUICK, rough, killer(5))
    with pytest.raises(InvalidInputError, match="holds a run on other responses, with another target"):
        train_drafter(target, [responses], tmp_path / "rough", SHAPE, QUICK, EXACT)
    outcome = train_drafter(target, [responses], tmp_path / "rough", SHAPE, QUICK, rough)
    losses = [
        np.array([entry["loss"] for entry in read_metrics(tmp_path / name / "metrics.jsonl")])
        for name in ("exact", "rough")
    ]
    assert not np.array_equal(*losses)
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)
    assert outcome.tau_greedy == pytest.approx(exact.tau_greedy, rel=0.1)
    kinds = [json.loads((tmp_path / name / "training.json").read_text())["compute_type"] for name in ("exact", "rough")]
    assert kinds == ["float32", "bfloat16"]


def test_a_damaged_checkpoint_is_named(target: Path, responses: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train_drafter(target, [responses], tmp_path / "d", SHAPE, QUICK, EXACT, killer(5))
    checkpoint = tmp_path / "d" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        train_drafter(target, [responses], tmp_path / "d", SHAPE, QUICK, EXACT)


def test_a_full_disk_leaves_the_last_checkpoint(
    target: Path, responses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspark_edge.trainer.training import checkpoints

    real = checkpoints.save_file
    calls = []

    def full(tensors: Any, path: Any, metadata: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(InvalidInputError, match="No space left"):
        train_drafter(target, [responses], tmp_path / "d", SHAPE, QUICK, EXACT)
    with safe_open(tmp_path / "d" / "checkpoint.safetensors", framework="pt") as stored:
        assert stored.metadata()["step"] == "4"
    assert not list((tmp_path / "d").glob("*.tmp"))


def test_features_from_the_cache_or_on_the_fly_train_alike(target: Path, responses: Path, tmp_path: Path) -> None:
    """Only fp16 is between them."""
    losses = []
    for name, size in (("cached", 10**9), ("half", 60_000), ("none", 0)):
        resources = replace(EXACT, cache_bytes=size)
        train_drafter(target, [responses], tmp_path / name, SHAPE, QUICK, resources)
        losses.append(read_metrics(tmp_path / name / "metrics.jsonl")[-1]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[2] == pytest.approx(losses[0], rel=1e-2)


def test_a_cache_that_is_kept_serves_the_next_run(target: Path, responses: Path, tmp_path: Path) -> None:
    resources = replace(EXACT, cache=tmp_path / "cache")
    computed: list[int] = []
    listener = Listener(features=lambda done, total: computed.append(done))
    train_drafter(target, [responses], tmp_path / "a", SHAPE, QUICK, resources, listener)
    assert computed
    computed.clear()
    train_drafter(target, [responses], tmp_path / "b", SHAPE, QUICK, resources, listener)
    assert not computed
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_gradient_checkpointing_changes_no_gradient(
    target: Path, responses: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspark_edge.trainer.training import trainer as training

    train_drafter(target, [responses], tmp_path / "a", SHAPE, QUICK, EXACT)
    monkeypatch.setattr(training, "available_memory", lambda device: 0)
    train_drafter(target, [responses], tmp_path / "b", SHAPE, QUICK, EXACT)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_two_processes_train_what_one_does(target: Path, responses: Path, tmp_path: Path) -> None:
    command = ["train", "--target", str(target), "--responses", str(responses), "--layers", "1", "--block-size", "4"]
    command += ["--taps", "0,2", "--markov-rank", "8", "--steps", "6", "--batch", "4", "--anchors", "5", "--warmup"]
    command += [
        "2",
        "--held-out",
        "0.2",
        "--compute-type",
        "fp32",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    launch = {
        "one": ["-m", "dspark_edge.runtime.cli"],
        "two": [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "-m",
            "dspark_edge.runtime.cli",
        ],
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, how in launch.items():
        done = subprocess.run(
            [sys.executable, *how, *command, "-o", str(tmp_path / name)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in launch)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"taps": (0, 5)}, "the taps are 0, 5, expected different layers from -1"),
        ({"taps": (1, 1)}, "the taps are 1, 1"),
        ({"mask_token_id": 260}, "mask_token_id is 260"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    target: Path, responses: Path, tmp_path: Path, shape: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        train_drafter(target, [responses], tmp_path / "d", DrafterSettings(**shape), QUICK, EXACT)


@pytest.mark.parametrize(
    ("settings", "values", "message"),
    [
        (DrafterSettings, {"layers": 0}, "layers is 0, expected at least 1"),
        (DrafterSettings, {"head": "gru"}, "head is 'gru'"),
        (DrafterSettings, {"block_size": 0}, "block_size is 0"),
        (TrainingSettings, {"steps": 0}, "steps is 0"),
        (TrainingSettings, {"learning_rate": 0.0}, "learning_rate is 0.0, expected above 0"),
        (TrainingSettings, {"prompt_anchors": 1.0}, "prompt_anchors is 1.0"),
        (TrainingSettings, {"divergence": -1.0}, "divergence is -1.0"),
        (TrainingSettings, {"divergence_share": 2.0}, "divergence_share is 2.0"),
        (TrainingSettings, {"warm_start": "best"}, "warm_start is 'best'"),
        (Resources, {"cache_bytes": -1}, "expected 0 \\(none\\) or more"),
        (Resources, {"dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_values_out_of_range_are_named(settings: Callable[..., Any], values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        settings(**values)


def test_automatic_taps_are_spread_and_never_the_last_layer() -> None:
    assert automatic_taps(30) == (1, 8, 14, 20, 27)
    assert automatic_taps(6) == (1, 2, 3)
    assert automatic_taps(2) == (0,)
    assert max(automatic_taps(3)) <= 1


def test_going_on_from_a_drafter(target: Path, responses: Path, tmp_path: Path) -> None:
    """With a learning rate of next to nothing it comes out as it went in; its draft vocabulary may differ."""
    from dataclasses import replace

    train_drafter(target, [responses], tmp_path / "a", replace(SHAPE, draft_vocab=100), QUICK, EXACT)
    still = replace(QUICK, steps=1, learning_rate=1e-12, warm_start=str(tmp_path / "a"))
    train_drafter(target, [responses], tmp_path / "b", replace(SHAPE, draft_vocab=100), still, EXACT)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "b" / "training.json").read_text())["training"]["warm_start"] == "a"
    train_drafter(target, [responses], tmp_path / "c", SHAPE, still, EXACT)
    wider = load_file(tmp_path / "c" / "model.safetensors")["markov_head.markov_w2.weight"]
    ids = before["draft_vocab_ids"]
    torch.testing.assert_close(wider[ids], before["markov_head.markov_w2.weight"], atol=1e-5, rtol=1e-5)
    assert int((wider.abs().amax(dim=1) > 1e-6).sum()) <= len(ids)
    with pytest.raises(InvalidInputError, match="its tap_layers is"):
        train_drafter(target, [responses], tmp_path / "d", replace(SHAPE, taps=(1, 2)), still, EXACT)


def test_copies_are_written_when_asked(target: Path, responses: Path, tmp_path: Path) -> None:
    resources = replace(EXACT, copies=True)
    train_drafter(target, [responses], tmp_path / "d", SHAPE, QUICK, resources)
    stored = load_file(tmp_path / "d" / "model.safetensors")
    own = load_file(target / "model.safetensors")
    assert torch.equal(stored["embed_tokens.weight"], own["model.embed_tokens.weight"])
    assert stored["lm_head.weight"].shape == stored["embed_tokens.weight"].shape


def _values(settings: TrainingSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in settings.__dataclass_fields__}


def test_anchors_lie_in_the_response_and_as_many_as_asked_in_the_prompt() -> None:
    from dspark_edge.trainer.training.batches import draw_anchors
    from dspark_edge.trainer.training.dataset import Example

    example = Example(np.arange(30, dtype=np.int32), 10, "test", "group", greedy=True)
    random = np.random.default_rng(0)
    assert draw_anchors(example, 100, random).tolist() == list(range(10, 29))  # the last token has none behind it
    drawn = draw_anchors(example, 8, random, prompt_share=0.25)
    assert len(drawn) == 8
    assert sorted(set(drawn.tolist())) == drawn.tolist()
    assert sum(position < 10 for position in drawn) == 2
    assert min(drawn) >= 1  # there is no context before the first token


def test_a_confidence_in_the_outcome_is_of_greedy_responses_alone() -> None:
    """Confidence logits of 0 lose log 2 whatever is wanted; those of ±5 tell apart what was."""
    from types import SimpleNamespace

    from dspark_edge.trainer.training.batches import collate
    from dspark_edge.trainer.training.dataset import Example
    from dspark_edge.trainer.training.features import Features
    from dspark_edge.trainer.training.objective import Vocabulary, step_loss

    head = torch.eye(4)
    examples = [
        Example(np.array([0, 1, 2, 3, 1], dtype=np.int32), 1, "a", str(greedy), greedy) for greedy in (True, False)
    ]
    hidden = 1.5 * torch.eye(4)[[1, 2, 3, 1, 0]]  # the target finds likeliest what comes
    features = Features(torch.zeros(5, 3), hidden, torch.logsumexp(hidden @ head.T, dim=-1))
    batch = collate(examples, [features] * 2, [np.array([1])] * 2, 3, torch.device("cpu"))
    drafted = 9.0 * torch.eye(4)[torch.tensor([[2, 3, 0]] * 2)][:, None]  # right, right, wrong; surer than the target
    logits = torch.tensor([5.0, 5.0, -5.0]).expand(2, 1, 3)
    blocks = SimpleNamespace(hidden=drafted, markov=None, confidence_logits=logits)
    vocabulary = Vocabulary(torch.zeros(4, 4), head, torch.arange(4), 0)

    def confidence_loss(target: str) -> tuple[float, torch.Tensor]:
        measures = step_loss(lambda *_: blocks, vocabulary, batch, None, confidence_target=target)  # type: ignore[arg-type]
        return float(measures.confidence_loss), measures.acceptance

    outcome, acceptance = confidence_loss("outcome")
    overlap, _ = confidence_loss("overlap")
    assert batch.greedy.tolist() == [True, False]
    weights = torch.exp(-torch.arange(3) / 4.0)
    right = torch.tensor([1.0, 1.0, 0.0])
    by_row = torch.nn.functional.binary_cross_entropy_with_logits
    expected = [
        by_row(logits[:, 0], torch.stack((wanted, acceptance[1, 0])), weights, reduction="sum").item()
        for wanted in (right, acceptance[0, 0])
    ]
    assert [outcome, overlap] == pytest.approx(expected, rel=1e-5)
    assert outcome < overlap


def test_blocks_of_an_earlier_answer_end_with_it() -> None:
    from dspark_edge.trainer.training.batches import collate, draw_anchors
    from dspark_edge.trainer.training.dataset import Example
    from dspark_edge.trainer.training.features import Features

    example = Example(np.arange(20, dtype=np.int32), 14, "test", "group", greedy=True, earlier=((4, 8),))
    random = np.random.default_rng(0)
    assert draw_anchors(example, 100, random).tolist() == [4, 5, 6, *range(14, 19)]
    asked = draw_anchors(example, 100, random, prompt_share=0.5).tolist()
    assert asked == [1, 2, 3, 4, 5, 6, *range(8, 14), *range(14, 19)]
    states = Features(torch.zeros(20, 3), torch.zeros(20, 2), torch.zeros(20))
    anchors = np.array([2, 5, 9, 16])
    batch = collate([example], [states], [anchors], 4, torch.device("cpu"))
    # An anchor of the prompt sees on into what follows; one of an answer learns nothing of what is said behind it.
    assert batch.valid[0].sum(dim=-1).tolist() == [4, 2, 4, 3]
    assert batch.label_ids[0, 1, :2].tolist() == [6, 7]


def test_every_sequence_comes_once_an_epoch() -> None:
    from dspark_edge.trainer.training.batches import batch_of_step, epoch_order

    lengths = tuple(5 + (7 * index) % 11 for index in range(40))
    for epoch in (0, 1):
        batches = epoch_order(lengths, 4, seed=3, epoch=epoch)
        assert sorted(index for batch in batches for index in batch) == list(range(40))
    assert epoch_order(lengths, 4, 3, 0) != epoch_order(lengths, 4, 3, 1)
    assert batch_of_step(lengths, 4, 3, 13) == (1, epoch_order(lengths, 4, 3, 1)[3])


def test_the_first_helps_of_the_loss_fade() -> None:
    from dspark_edge.trainer.training.trainer import fading

    settings = TrainingSettings(steps=100, divergence_share=0.5)
    assert [round(fading(step, settings), 3) for step in (0, 25, 50, 99)] == [1.0, 0.5, 0.0, 0.0]
    assert fading(0, TrainingSettings(divergence_share=0.0)) == 0.0


def test_short_blocks_come_first_and_more_of_them() -> None:
    from dspark_edge.trainer.training.trainer import block_of_step

    settings = TrainingSettings(steps=100, anchors=30, short_share=0.6, short_block=3)
    assert [block_of_step(step, settings, 7) for step in (0, 59, 60, 99)] == [(3, 70), (3, 70), (7, 30), (7, 30)]
    assert block_of_step(0, settings, 3) == (3, 30)  # the drafter's own blocks are no longer
    assert block_of_step(0, TrainingSettings(anchors=30, short_share=0.0), 7) == (7, 30)


@pytest.mark.parametrize("head", ["vanilla", "rnn", "gated"])
def test_a_drafter_starts_with_the_targets_own_logits(target: Path, head: str) -> None:
    """W2 is zero, so that the sequential head adds nothing before it has learned something; W1 is not random."""
    from dspark_edge.trainer.target_model import TargetModel
    from dspark_edge.trainer.training.drafter_model import TrainableDrafter
    from dspark_edge.trainer.training.initialization import initialize

    model = TargetModel.load(target, 16)
    shape = DrafterSettings(layers=1, markov_rank=8, head=head).shape(model.config, 257)
    first, second = (TrainableDrafter(shape, 16) for _ in range(2))
    initialize(first, model, "none", seed=0)
    initialize(second, model, "none", seed=1)
    assert not first.markov_head.markov_w2.weight.any()
    assert torch.equal(first.markov_head.markov_w1.weight, second.markov_head.markov_w1.weight)
    assert not torch.equal(first.fc.weight, second.fc.weight)
