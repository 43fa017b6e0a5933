"""Three ways to answer questions, and that they say the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.runtime.generator import Generator
from dspark_edge.trainer.responses.engine_responder import BatchResponder, GeneratorResponder
from dspark_edge.trainer.responses.responders import Answer, Question, Responder, draw_uniforms
from tests.conftest import runs_lowering

TORCH_FREE = (
    *("responses." + name for name in ("responders", "engine_responder", "plan", "writer", "cli")),
    *("training." + name for name in ("dataset", "vocabulary")),
)
STOP = 32  # the byte that ends a word: what the tests of stopping call the end of text


def batched(source: Path, folder: Path, eos_ids: Sequence[int] = (256,)) -> Path:
    """A copy of a bundle whose lowering decodes batches, for four sequences together."""
    shutil.copytree(source, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["limits"]["max_batch"] = 4
    manifest["target"]["eos_token_ids"] = list(eos_ids)
    path.write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="module")
def drafting_bundle(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a DSpark drafter that decodes batches; needs no torch."""
    source = bundle_dir.with_name("qwen3_rnn_decomposed")
    return batched(source, tmp_path_factory.mktemp("batched") / "bundle")


@pytest.fixture(scope="module")
def batch_responder(drafting_bundle: Path) -> Iterator[BatchResponder]:
    with OnnxRuntimeEngine(Bundle.open(drafting_bundle), threads=1) as engine:
        yield BatchResponder(engine)


@pytest.fixture(scope="module")
def stopping_responder(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BatchResponder]:
    """The same bundle, with `STOP` as its end of text."""
    source = bundle_dir.with_name("qwen3_rnn_decomposed")
    folder = batched(source, tmp_path_factory.mktemp("stopping") / "bundle", [STOP])
    with OnnxRuntimeEngine(Bundle.open(folder), threads=1) as engine:
        yield BatchResponder(engine)


def greedy_questions(record: Any, limits: Sequence[int]) -> list[Question]:
    """The first recorded prompts: of 3, 17, 40 and 64 tokens."""
    samples = record["samples"][: len(limits)]
    return [Question(tuple(s["prompt"]), limit, 0.0, 0) for s, limit in zip(samples, limits, strict=True)]


def recorded_answers(record: Any, limits: Sequence[int]) -> list[Answer]:
    samples = record["samples"][: len(limits)]
    outputs = [tuple(sample["output"][len(sample["prompt"]) :]) for sample in samples]
    return [Answer(output[:limit], "length") for output, limit in zip(outputs, limits, strict=True)]


def until_stop(answer: Answer, limit: int) -> Answer:
    """What is left of a longer answer where `STOP` ends it."""
    ids = answer.token_ids[:limit]
    return Answer(ids[: ids.index(STOP) + 1], "stop") if STOP in ids else Answer(ids, "length")


def sampled(questions: Sequence[Question], temperature: float = 1.0) -> list[Question]:
    return [replace(each, temperature=temperature, seed=seed) for seed, each in enumerate(questions)]


def expect_recorded(responder: Responder, record: Any) -> None:
    for limits in ((64, 64, 64, 64), (5, 64, 33, 1), (20, 64), (7, 3, 9)):
        assert responder.answer(greedy_questions(record, limits)) == recorded_answers(record, limits)


def expect_stops(responder: Responder, record: Any) -> None:
    limits = (64, 40, 64, 64)
    answers = responder.answer(greedy_questions(record, limits))
    assert answers == [until_stop(whole, 64) for whole in recorded_answers(record, limits)]
    assert any(answer.finish_reason == "stop" and len(answer.token_ids) < 10 for answer in answers)


def expect_repeatable_draws(responder: Responder, record: Any) -> None:
    """Draws depend on the seed; greedy questions in the same wave are greedy all the same."""
    limits = (40, 40, 40, 40)
    questions = sampled(greedy_questions(record, limits))
    first = responder.answer(questions)
    assert responder.answer(questions) == first
    again = responder.answer([replace(each, seed=each.seed + 100) for each in questions])
    assert all(one != other for one, other in zip(first, again, strict=True))
    mixed = [questions[0], *greedy_questions(record, limits)[1:3], questions[3]]
    greedy = recorded_answers(record, limits)
    assert responder.answer(mixed) == [first[0], greedy[1], greedy[2], first[3]]


def test_uniforms_are_a_questions_own() -> None:
    questions = [Question((1,), 3, 1.0, 7), Question((1,), 5, 0.0, 7), Question((1,), 4, 0.5, 8)]
    drawn = draw_uniforms(questions)
    assert drawn.shape == (3, 5) and drawn.dtype == np.float32
    assert not drawn[1].any() and not drawn[0, 3:].any() and (drawn >= 0).all() and (drawn < 1).all()
    (alone,) = draw_uniforms([replace(questions[0], max_new_tokens=6)])
    assert alone[:3].tolist() == drawn[0, :3].tolist() != drawn[2, :3].tolist()


def test_batches_with_a_drafters_caches_say_what_was_recorded(batch_responder: BatchResponder, record: Any) -> None:
    assert batch_responder.capacity == 256
    expect_recorded(batch_responder, record)
    expect_repeatable_draws(batch_responder, record)


def test_batches_stop(stopping_responder: BatchResponder, record: Any) -> None:
    expect_stops(stopping_responder, record)


def test_batches_use_the_whole_capacity(batch_responder: BatchResponder, record: Any) -> None:
    prompt = tuple(record["samples"][5]["prompt"])
    assert len(prompt) == 130
    questions = [Question(prompt, 126, 0.0, 0), Question(prompt[:3], 10, 0.0, 0)]
    long, short = batch_responder.answer(questions)
    assert len(long.token_ids) == 126 and len(short.token_ids) == 10
    assert batch_responder.answer(questions[:1]) == [long]


def test_one_after_another_says_what_was_recorded(bundle_dir: Path, record: Any) -> None:
    with Generator.open(bundle_dir, threads=1) as generator:
        responder = GeneratorResponder(generator)
        assert responder.capacity == 256
        expect_recorded(responder, record)
        expect_repeatable_draws(responder, record)


def test_an_answer_does_not_depend_on_the_question_before(bundle_dir: Path, record: Any) -> None:
    questions = sampled(greedy_questions(record, (20, 20, 20)))
    # One that begins like the one before would go on from its caches.
    questions.append(replace(questions[2], token_ids=(*questions[2].token_ids, 101, 32)))
    with Generator.open(bundle_dir, threads=1) as generator:
        responder = GeneratorResponder(generator)
        together = responder.answer(questions)
        assert [responder.answer([each])[0] for each in reversed(questions)] == together[::-1]


IMPORT_WITHOUT_TORCH = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "gguf", "matplotlib"):
            raise SystemExit(f"{name} was imported")  # no ImportError: a module might catch that

sys.meta_path.insert(0, Refuse())
for name in sys.argv[1:]:
    importlib.import_module(f"dspark_edge.trainer.{name}")
"""


def test_responses_need_no_torch() -> None:
    command = [sys.executable, "-c", IMPORT_WITHOUT_TORCH, *TORCH_FREE]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def torch_responder(reference_dir: Path) -> Callable[..., Responder]:
    """`torch_responder(eos_ids, positions=256)`: the reference target in torch."""
    pytest.importorskip("torch", reason="the torch responder needs the [train] extra")
    from dspark_edge.trainer.responses.torch_responder import TorchResponder
    from dspark_edge.trainer.target_model import TargetModel

    targets: dict[int, TargetModel] = {}

    def make(eos_ids: Sequence[int] = (256,), positions: int = 256) -> Responder:
        if positions not in targets:
            targets[positions] = TargetModel.load(reference_dir / "qwen3_target", positions)
        return TorchResponder(targets[positions], eos_ids)

    return make


@pytest.mark.needs_export
def test_torch_says_what_was_recorded(torch_responder: Callable[..., Responder], record: Any) -> None:
    responder = torch_responder()
    assert responder.capacity == 256
    expect_recorded(responder, record)
    expect_repeatable_draws(responder, record)
    expect_stops(torch_responder([STOP]), record)
    assert torch_responder([]).answer(greedy_questions(record, (9, 9))) == recorded_answers(record, (9, 9))


@pytest.mark.needs_export
@pytest.mark.parametrize("compact_below", [0.0, 0.5, 1.0], ids=["never", "at-half", "always"])
def test_finished_rows_change_nothing(
    torch_responder: Callable[..., Responder], record: Any, monkeypatch: pytest.MonkeyPatch, compact_below: float
) -> None:
    from dspark_edge.trainer.responses import torch_responder as module

    monkeypatch.setattr(module, "_COMPACT_BELOW", compact_below)
    monkeypatch.setattr(module, "_PREFILL_TOKENS", 64)  # one or three prompts a prefill
    # The longest prompt is through at once, while a short one goes on: no row may pass the 64 + 5 positions there are.
    limits = (64, 50, 20, 5)
    responder = torch_responder([256], 69)
    assert responder.answer(greedy_questions(record, limits)) == recorded_answers(record, limits)
    responder = torch_responder([STOP], 128)
    expect_stops(responder, record)


@pytest.mark.needs_export
def test_caches_that_do_not_fit_are_refused(
    torch_responder: Callable[..., Responder], record: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dspark_edge.trainer import target_model

    responder = torch_responder()
    monkeypatch.setattr(target_model, "available_memory", lambda device: 100_000)
    with pytest.raises(InvalidInputError, match=r"caches of 2 sequences of 81 tokens need .* kB, 100\.0 kB are free"):
        responder.answer(greedy_questions(record, (64, 64)))


@pytest.mark.needs_export
def test_all_ways_agree_where_the_bundle_is_of_the_onnx_lowering(
    export_once: Callable[..., Path],
    reference_dir: Path,
    torch_responder: Callable[..., Responder],
    bundle_dir: Path,
    record: Any,
) -> None:
    if not runs_lowering("onnx", "ngram"):
        pytest.skip("this ONNX Runtime is too old for the lowering 'onnx'")
    path = export_once(
        "qwen3_target-ngram-onnx-batch4",
        reference_dir / "qwen3_target",
        "ngram",
        lowering="onnx",
        capacity=256,
        max_batch=4,
    )
    limits = (30, 64, 12, 50)
    questions = greedy_questions(record, limits)
    expected = recorded_answers(record, limits)
    with OnnxRuntimeEngine(Bundle.open(path), threads=1) as engine:
        responder = BatchResponder(engine)
        expect_recorded(responder, record)
        expect_repeatable_draws(responder, record)
        drawn = responder.answer(sampled(questions, 0.5))
    assert torch_responder().answer(questions) == expected
    # The same numbers drive the same inverse of the distribution function.
    assert torch_responder().answer(sampled(questions, 0.5)) == drawn
    for bundle in (path, bundle_dir):
        with Generator.open(bundle, threads=1) as generator:
            assert GeneratorResponder(generator).answer(questions) == expected
