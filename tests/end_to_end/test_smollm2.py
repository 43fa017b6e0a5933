"""A real model from its GGUF to text: SmolLM2-135M-Instruct, which `make` fetches.

Set DSPARK_TEST_GGUF to its path to run these without make.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.runtime import Generator, Message, SamplingParams

pytestmark = [
    pytest.mark.needs_export,
    pytest.mark.skipif("DSPARK_TEST_GGUF" not in os.environ, reason="DSPARK_TEST_GGUF names no model; use make test"),
]

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"


@pytest.fixture(scope="module")
def gguf() -> Path:
    return Path(os.environ["DSPARK_TEST_GGUF"])


@pytest.fixture(scope="module")
def bundle(export_once: Callable[..., Path], gguf: Path) -> Path:
    return export_once("smollm2", gguf, "ngram")


@pytest.fixture(scope="module")
def plain(bundle: Path) -> Iterator[Generator]:
    with Generator.open(bundle, mode="plain") as generator:
        yield generator


@pytest.fixture(scope="module")
def static(bundle: Path) -> Iterator[Generator]:
    with Generator.open(bundle, mode="static") as generator:
        yield generator


def test_the_bundle_says_what_it_is(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    opened.verify()
    target = opened.manifest.target
    assert (target.architecture, target.num_layers, target.vocab_size) == ("LlamaForCausalLM", 30, 49152)
    assert (round(target.parameters / 1e6), opened.manifest.limits.capacity) == (135, 4096)


def test_it_answers(static: Generator) -> None:
    answer = static.generate("What is the capital of France?", SamplingParams(max_new_tokens=30))
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


def test_static_and_plain_decoding_say_the_same(static: Generator, plain: Generator) -> None:
    params = SamplingParams(max_new_tokens=32)
    accepted: list[int] = []
    for line in PROMPTS.read_text().splitlines():
        prompt = json.loads(line)["turns"][0]
        speculative, alone = static.generate(prompt, params), plain.generate(prompt, params)
        assert speculative.token_ids == alone.token_ids, prompt
        assert speculative.text == alone.text
        accepted += speculative.statistics.accepted_lengths
    assert max(accepted) > 2, "no draft was ever accepted: nothing was tested"


def test_a_conversation_prefills_only_its_new_turn(static: Generator) -> None:
    params = SamplingParams(max_new_tokens=40)
    messages = [Message("user", "Name one colour.")]
    first = static.generate(messages, params)
    messages += [Message("assistant", first.text), Message("user", "Name another one.")]
    second = static.generate(messages, params)
    statistics = second.statistics
    assert statistics.cached_prompt_tokens >= first.statistics.prompt_tokens
    static.reset()
    assert static.generate(messages, params).token_ids == second.token_ids


def test_it_says_what_transformers_says(gguf: Path, plain: Generator) -> None:
    """The same weights in Hugging Face's own model, decoded greedily."""
    torch: Any = pytest.importorskip("torch")
    transformers: Any = pytest.importorskip("transformers")
    from dspark_edge.exporter.checkpoint import open_checkpoint

    with open_checkpoint(gguf) as checkpoint, torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**checkpoint.config))
    with open_checkpoint(gguf) as checkpoint:
        tensors = {name: checkpoint.tensor(name).float() for name in checkpoint.names()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, assign=True)
    rotary = type(model.model.rotary_emb)(model.config)  # its tables are buffers, which no checkpoint holds
    model.model.rotary_emb = rotary
    prompt = plain.encode("Write one sentence about the sea.")
    with torch.no_grad():
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16)[0, len(prompt) :]
    answer = plain.generate(prompt, SamplingParams(max_new_tokens=16))
    assert list(answer.token_ids) == expected.tolist()
