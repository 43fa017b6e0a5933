"""The generation API on a real (tiny) model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.errors import CapacityError, EngineError, InvalidInputError
from dspark_edge.runtime import Generation, Generator, GeneratorOptions, Message, SamplingParams
from dspark_edge.runtime import model as model_module

PROMPT = [int(byte) for byte in b"the cat sat on"]
LONG = SamplingParams(max_new_tokens=64)


def test_the_recorded_rounds_come_out(generator: Generator, record: Any) -> None:
    for sample in record["samples"]:
        answer = generator.generate(sample["prompt"], LONG)
        assert list(answer.token_ids) == sample["output"][len(sample["prompt"]) :]
        accepted = list(answer.statistics.accepted_lengths)
        # The recording went on for one more round where a round ended exactly at 64 tokens.
        assert accepted == sample["acceptance_lengths"][: len(accepted)]
        assert len(sample["acceptance_lengths"]) - len(accepted) <= 1
        assert answer.statistics.rounds == len(accepted)


def test_plain_decoding_gives_the_same_tokens(generator: Generator, plain_generator: Generator, record: Any) -> None:
    for sample in record["samples"]:
        static, plain = generator.generate(sample["prompt"], LONG), plain_generator.generate(sample["prompt"], LONG)
        assert static.token_ids == plain.token_ids
        assert static.log_probs == pytest.approx(plain.log_probs, abs=1e-4)
        assert set(plain.statistics.accepted_lengths) == {1}
        assert plain.statistics.draft_tokens == 0 and static.statistics.draft_tokens > 0


@pytest.mark.parametrize("verify_length", [1, 3, 7])
def test_any_verify_length_gives_the_same_tokens(
    bundle_dir: Path, plain_generator: Generator, verify_length: int
) -> None:
    with Generator.open(bundle_dir, verify_length=verify_length, threads=1) as generator:
        answer = generator.generate(PROMPT, LONG)
    assert answer.token_ids == plain_generator.generate(PROMPT, LONG).token_ids
    assert max(answer.statistics.accepted_lengths) <= verify_length + 1


@pytest.mark.parametrize("chunk", [1, 3, 14, 256])
def test_the_prefill_chunk_changes_nothing(bundle_dir: Path, generator: Generator, chunk: int) -> None:
    with Generator.open(bundle_dir, prefill_chunk=chunk, threads=1) as chunked:
        assert chunked.generate(PROMPT, LONG).token_ids == generator.generate(PROMPT, LONG).token_ids


def test_growing_caches_keep_their_content(
    bundle_dir: Path, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "_FIRST_CAPACITY", 16)
    with Generator.open(bundle_dir, threads=1) as growing:
        if growing.bundle.manifest.lowering != "ort":
            pytest.skip("only the ort lowering has caches that grow")
        answer = growing.generate(PROMPT, LONG)
        assert growing._verifier.caches.capacity == 128
    assert answer.token_ids == generator.generate(PROMPT, LONG).token_ids


@pytest.mark.parametrize("mode", ["plain", "static"])
def test_decoding_goes_on_to_the_last_slot(bundle_dir: Path, mode: str) -> None:
    with Generator.open(bundle_dir, mode=mode, threads=1) as generator:
        answer = generator.generate(PROMPT, SamplingParams(max_new_tokens=None))
    # Every token but the last has a slot of the 256.
    assert (len(PROMPT) + len(answer.token_ids), answer.finish_reason) == (257, "length")


def test_both_modes_agree_up_to_the_last_slot(generator: Generator, plain_generator: Generator) -> None:
    unlimited = SamplingParams(max_new_tokens=None)
    assert generator.generate(PROMPT, unlimited).token_ids == plain_generator.generate(PROMPT, unlimited).token_ids


def test_a_prompt_may_fill_the_capacity_but_not_pass_it(generator: Generator) -> None:
    full = generator.generate([104] * 256, SamplingParams(max_new_tokens=9))
    assert (len(full.token_ids), full.finish_reason) == (1, "length")
    with pytest.raises(CapacityError, match="the prompt has 257 tokens, the bundle's capacity is 256"):
        generator.generate([104] * 257)


def test_a_stop_token_cuts_inside_an_accepted_block(generator: Generator) -> None:
    whole = generator.generate(PROMPT, LONG).token_ids
    for position in (0, 1, 5, 20):
        stop = whole[position]
        first = whole.index(stop)
        answer = generator.generate(PROMPT, SamplingParams(max_new_tokens=64, stop_token_ids=(stop,)))
        assert (answer.token_ids, answer.finish_reason) == (whole[: first + 1], "stop")
        assert len(answer.log_probs) == first + 1


def test_max_new_tokens_cuts_inside_an_accepted_block(generator: Generator) -> None:
    whole = generator.generate(PROMPT, LONG).token_ids
    for length in range(1, 20):
        answer = generator.generate(PROMPT, SamplingParams(max_new_tokens=length))
        assert (answer.token_ids, answer.finish_reason) == (whole[:length], "length")


def test_a_second_turn_prefills_only_what_is_new(generator: Generator) -> None:
    generator.reset()
    first = generator.generate(PROMPT, LONG)
    assert first.statistics.cached_prompt_tokens == 0
    longer = [*PROMPT, *first.token_ids, 32, 116]
    second = generator.generate(longer, LONG)
    # The last token is cached only where its round was cut behind it.
    assert second.statistics.cached_prompt_tokens in (len(PROMPT) + 63, len(PROMPT) + 64)
    generator.reset()
    assert generator.generate(longer, LONG).token_ids == second.token_ids


def test_an_edited_conversation_is_reused_up_to_the_edit(generator: Generator) -> None:
    generator.reset()
    first = generator.generate(PROMPT, LONG)
    edited = [*PROMPT, *first.token_ids[:10], 33]
    answer = generator.generate(edited, LONG)
    assert answer.statistics.cached_prompt_tokens == len(PROMPT) + 10
    generator.reset()
    assert generator.generate(edited, LONG).token_ids == answer.token_ids


def test_the_same_prompt_again_is_answered_from_the_caches(generator: Generator) -> None:
    first, second = generator.generate(PROMPT, LONG), generator.generate(PROMPT, LONG)
    assert first.token_ids == second.token_ids
    assert second.statistics.cached_prompt_tokens == len(PROMPT) - 1


def test_a_stream_gives_what_generate_gives(text_generator: Generator) -> None:
    pieces = list(text_generator.stream("the cat", LONG))
    answer = text_generator.generate("the cat", LONG)
    assert "".join(piece.text for piece in pieces) == answer.text
    assert tuple(token for piece in pieces for token in piece.token_ids) == answer.token_ids
    assert [piece.generation is not None for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_a_text_is_fed_with_its_template_or_raw(text_generator: Generator) -> None:
    assert bytes(text_generator.encode("hi")) == b"u: hi\na: "
    assert bytes(text_generator.encode("hi", raw=True)) == b"hi"
    messages = [Message("system", "x"), Message("user", "y")]
    assert bytes(text_generator.encode(messages)) == b"s: x\nu: y\na: "


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(text_generator: Generator) -> None:
    whole = text_generator.generate("the cat", LONG, raw=True)
    stop = whole.text[10:14]
    answer = text_generator.generate("the cat", SamplingParams(max_new_tokens=64, stop=(stop,)), raw=True)
    cut = whole.text.index(stop)
    assert (answer.text, answer.finish_reason) == (whole.text[:cut], "stop")
    assert answer.token_ids == whole.token_ids[: cut + len(stop)]  # a token a byte


def test_closing_a_stream_leaves_the_generator_usable(generator: Generator) -> None:
    whole = generator.generate(PROMPT, LONG).token_ids
    stream = generator.stream(PROMPT, LONG)
    next(stream), next(stream)
    stream.close()
    assert generator.generate(PROMPT, LONG).token_ids == whole


def test_a_stream_cannot_go_on_once_another_was_started(generator: Generator) -> None:
    stream = generator.stream(PROMPT, LONG)
    next(stream)
    generator.generate([1, 2, 3], LONG)
    with pytest.raises(InvalidInputError, match="another generation was started"):
        next(stream)


def test_cancelling_ends_after_the_current_round(generator: Generator) -> None:
    generations: list[Generation] = []
    for count, piece in enumerate(generator.stream(PROMPT, LONG)):
        if count == 2:
            generator.cancel()
        if piece.generation:
            generations.append(piece.generation)
    (answer,) = generations
    assert answer.finish_reason == "cancelled"
    assert 3 <= len(answer.token_ids) < 64


def test_a_seed_fixes_the_answer(generator: Generator) -> None:
    def sample(seed: int) -> tuple[int, ...]:
        return generator.generate(PROMPT, SamplingParams(max_new_tokens=40, temperature=1.0, seed=seed)).token_ids

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(5)}) > 1


def test_a_filter_that_leaves_one_token_is_greedy(generator: Generator) -> None:
    greedy = generator.generate(PROMPT, LONG).token_ids
    for values in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        params = SamplingParams(max_new_tokens=64, temperature=0.8, seed=3, **values)  # type: ignore[arg-type]
        assert generator.generate(PROMPT, params).token_ids == greedy


def test_a_pool_that_is_too_small_is_repeated_with_the_whole_vocabulary(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_new_tokens=40, temperature=1.5, top_p=0.999, seed=5)
    expected = generator.generate(PROMPT, params).token_ids
    monkeypatch.setattr(model_module, "_FILTER_POOL", 2)
    assert generator.generate(PROMPT, params).token_ids == expected


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([], "the prompt is empty"),
        ([1, 260], "260 is outside the vocabulary of 260"),
        ([-1], "-1 is outside the vocabulary"),
        ([True], "True is outside the vocabulary"),
        ("text", "the bundle has no tokenizer, which a text prompt needs"),
        ([Message("user", "text")], "the bundle has no tokenizer"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(generator: Generator, prompt: Any, problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        generator.generate(prompt)


def test_a_stop_text_needs_a_tokenizer(generator: Generator) -> None:
    with pytest.raises(InvalidInputError, match="a stop text needs"):
        generator.generate(PROMPT, SamplingParams(stop=("x",)))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"verify_length": 0}, "verify_length is 0"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        GeneratorOptions(**values)


def test_a_verify_length_beyond_the_block_is_refused(bundle_dir: Path) -> None:
    with pytest.raises(InvalidInputError, match="verify_length is 8, the drafter's block has 7"):
        Generator.open(bundle_dir, verify_length=8)


def test_a_missing_provider_is_named(bundle_dir: Path) -> None:
    with pytest.raises(EngineError, match=r"has no NoSuchProvider; it has .*CPUExecutionProvider"):
        Generator.open(bundle_dir, provider="NoSuchProvider")


def test_onnx_runtime_has_nothing_to_warn_about(bundle_dir: Path) -> None:
    """Caches that are copied instead of updated in place show as a warning on stderr."""
    program = (
        "import sys; from dspark_edge.runtime import Generator, SamplingParams\n"
        "for mode in ('plain', 'static'):\n"
        "    with Generator.open(sys.argv[1], mode=mode) as generator:\n"
        "        for temperature in (0.0, 1.0):\n"
        "            generator.generate([104, 105], SamplingParams(max_new_tokens=20, temperature=temperature))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(bundle_dir)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
