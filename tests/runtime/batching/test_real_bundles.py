"""Batches of a real (tiny) model in all executions, compared with a single stream."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.errors import BundleError, EngineError, InvalidInputError
from dspark_edge.engines.machine import Memory
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.runtime import Generation, Generator, SamplingParams
from dspark_edge.runtime import model as model_module
from dspark_edge.runtime.batching import BatchGenerator
from dspark_edge.runtime.batching.executor import choose_grouping
from dspark_edge.runtime.batching.target import PackedTargetCalls, TargetCalls

from ...conftest import runs_lowering
from ..scripted import TableCosts

TEXT = b"the cat sat on the mat and the dog sat on the log and so on and on"
PROMPTS = [list(TEXT[start : start + length]) for start, length in enumerate((3, 14, 1, 30, 7, 21, 5, 11, 2, 17))]
LENGTHS = (12, 3, 20, 8, 1, 15, 24, 6, 10, 18)
COSTS = TableCosts(target=(1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35), draft=0.05)
MODES: dict[str, dict[str, Any]] = {
    "plain": {"mode": "plain"},
    "static": {"mode": "static"},
    "short": {"mode": "static", "verify_length": 2},
    "scheduled": {"mode": "scheduled", "costs": COSTS},
}


@pytest.fixture(scope="module", params=["ort", "decomposed", "packed"])
def either_bundle(request: pytest.FixtureRequest) -> Path:
    """The reference pair in the lowering that runs serially, in one that runs dense, and with packed graphs."""
    if request.param == "packed":
        packed: Path = request.getfixturevalue("packed_bundle_dir")
        return packed
    if not runs_lowering(request.param, "dspark"):
        pytest.skip("this ONNX Runtime is too old for the lowering")
    return Path(__file__).parents[2] / "data" / "bundles" / f"qwen3_rnn_{request.param}"


@pytest.fixture(scope="module")
def alone(either_bundle: Path) -> Iterator[Generator]:
    with Generator.open(either_bundle, mode="plain", threads=1) as generator:
        yield generator


@pytest.fixture(scope="module")
def expected(alone: Generator) -> list[Generation]:
    return [
        alone.generate(prompt, SamplingParams(max_new_tokens=length))
        for prompt, length in zip(PROMPTS, LENGTHS, strict=True)
    ]


def answer_all(generator: BatchGenerator, params: list[SamplingParams], at_once: int) -> list[Generation]:
    """Two requests join before every step."""
    tickets = []
    while len(tickets) < len(params) or not generator.idle:
        for index in range(len(tickets), min(len(tickets) + at_once, len(params))):
            tickets.append(generator.submit(PROMPTS[index], params[index]))
        generator.step()
    return [ticket.result() for ticket in tickets]


@pytest.mark.parametrize("slots", [1, 2, 4, 8])
@pytest.mark.parametrize("mode", MODES)
def test_greedy_answers_are_those_of_a_single_stream(
    either_bundle: Path, expected: list[Generation], mode: str, slots: int
) -> None:
    params = [SamplingParams(max_new_tokens=length) for length in LENGTHS]
    with BatchGenerator.open(either_bundle, slots=slots, prefill_chunk=8, threads=1, **MODES[mode]) as generator:
        answers = answer_all(generator, params, at_once=2)
    for answer, plain in zip(answers, expected, strict=True):
        assert (answer.token_ids, answer.finish_reason) == (plain.token_ids, plain.finish_reason)
        assert answer.log_probs == pytest.approx(plain.log_probs, abs=1e-4)


def test_a_dense_lowering_runs_serially_too(either_bundle: Path, expected: list[Generation]) -> None:
    params = [SamplingParams(max_new_tokens=length) for length in LENGTHS]
    with BatchGenerator.open(either_bundle, mode="static", execution="serial", threads=1) as generator:
        answers = answer_all(generator, params, at_once=3)
    assert [answer.token_ids for answer in answers] == [plain.token_ids for plain in expected]


@pytest.mark.parametrize("mode", ["plain", "static"])
def test_sampled_answers_do_not_depend_on_the_neighbours(either_bundle: Path, mode: str) -> None:
    """Seeded requests of all kinds of sampling, mixed: each draws what it draws alone."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
        {"temperature": 0.0},
        {"temperature": 1.3, "min_p": 0.01},
        {"temperature": 0.8},
    ]
    params = [
        SamplingParams(max_new_tokens=length, seed=index, ignore_eos=True, **kinds[index % len(kinds)])
        for index, length in enumerate(LENGTHS)
    ]
    with Generator.open(either_bundle, mode=mode, threads=1) as single:
        wanted = []
        for prompt, one in zip(PROMPTS, params, strict=True):
            single.reset()
            wanted.append(single.generate(prompt, one).token_ids)
    for slots, at_once in ((1, 1), (3, 2), (8, 8)):
        with BatchGenerator.open(either_bundle, mode=mode, slots=slots, prefill_chunk=8, threads=1) as generator:
            answers = answer_all(generator, params, at_once)
        assert [answer.token_ids for answer in answers] == wanted


def test_a_pool_that_is_too_small_is_repeated_with_the_whole_vocabulary(
    either_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_new_tokens=12, temperature=1.5, top_p=0.999, seed=5)
    with BatchGenerator.open(either_bundle, mode="static", slots=2, threads=1) as generator:
        before = generator.generate(PROMPTS[:2], params)
        monkeypatch.setattr(model_module, "_FILTER_POOL", 2)
        after = generator.generate(PROMPTS[:2], params)
    assert [answer.token_ids for answer in before] == [answer.token_ids for answer in after]


@pytest.mark.parametrize("mode", ["plain", "static", "scheduled"])
def test_a_request_decodes_to_its_last_slot_beside_others(either_bundle: Path, alone: Generator, mode: str) -> None:
    """In a dense call the others go on at their width while the first has no room for it."""
    full, short = [104, 101] * 122, [104]  # 244 of 256 slots
    unlimited, some = SamplingParams(max_new_tokens=None, ignore_eos=True), SamplingParams(max_new_tokens=40)
    options = MODES[mode]
    with BatchGenerator.open(either_bundle, slots=3, prefill_chunk=256, threads=1, **options) as generator:
        tickets = [generator.submit(short, some), generator.submit(full, unlimited), generator.submit(PROMPTS[1], some)]
        list(generator.run())
    for ticket, prompt, params in zip(tickets, (short, full, PROMPTS[1]), (some, unlimited, some), strict=True):
        assert ticket.result().token_ids == alone.generate(prompt, params).token_ids
    assert len(full) + len(tickets[1].result().token_ids) == 257


def test_growing_caches_keep_every_slots_content(
    either_bundle: Path, expected: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "_FIRST_CAPACITY", 8)
    params = [SamplingParams(max_new_tokens=length) for length in LENGTHS]
    with BatchGenerator.open(either_bundle, mode="static", slots=3, threads=1) as generator:
        answers = answer_all(generator, params, at_once=1)
    assert [answer.token_ids for answer in answers] == [plain.token_ids for plain in expected]


@pytest.fixture(scope="module")
def ngram_dir(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same target, whose drafter looks its drafts up."""
    folder = tmp_path_factory.mktemp("bundles") / "ngram"
    copytree(bundle_dir, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    nothing = {int: 0, bool: False, str: "none", list: [], type(None): None}
    manifest["drafter"] = {name: nothing[type(value)] for name, value in manifest["drafter"].items()}
    manifest["drafter"] |= {"kind": "ngram", "block_size": 4, "mask_token_id": None}
    del manifest["graphs"]["drafter"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("mode", ["static", "scheduled"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_prompt_lookup_for_every_slot(ngram_dir: Path, mode: str, temperature: float) -> None:
    prompts = [[*b"abcabcabca", *b"bc" * index] for index in range(6)]
    params = SamplingParams(max_new_tokens=20, temperature=temperature, seed=4, ignore_eos=True)
    with BatchGenerator.open(ngram_dir, slots=3, threads=1, **MODES[mode]) as generator:
        answers = generator.generate(prompts, params)
    if mode == "static" or temperature == 0:  # a schedule changes which numbers are drawn, not from what
        with Generator.open(ngram_dir, mode="static", threads=1) as single:
            for prompt, answer in zip(prompts, answers, strict=True):
                single.reset()
                assert answer.token_ids == single.generate(prompt, params).token_ids
    if mode == "static":
        assert sum(answer.statistics.draft_tokens for answer in answers) > 0


def test_text_goes_in_and_comes_out_in_pieces(text_bundle_dir: Path, text_generator: Generator) -> None:
    params = SamplingParams(max_new_tokens=24)
    whole = text_generator.generate("the cat", params)
    stopping = SamplingParams(max_new_tokens=24, stop=(whole.text[6:9],))
    with BatchGenerator.open(text_bundle_dir, mode="static", slots=2, threads=1) as generator:
        tickets = [generator.submit("the cat", params), generator.submit("the cat", stopping)]
        pieces: dict[int, str] = {}
        for event in generator.run():
            pieces[event.request_id] = pieces.get(event.request_id, "") + event.text
        assert [pieces[ticket.request_id] for ticket in tickets] == [ticket.result().text for ticket in tickets]
    assert tickets[0].result().text == whole.text
    assert tickets[1].result().text == whole.text[: whole.text.index(whole.text[6:9])]
    assert tickets[1].result().finish_reason == "stop"


def test_the_mode_follows_the_costs(bundle_dir: Path) -> None:
    with BatchGenerator.open(bundle_dir, threads=1) as generator:
        assert generator.options.mode == "static"
    with BatchGenerator.open(bundle_dir, costs=COSTS, threads=1) as generator:
        assert generator.options.mode == "scheduled"
    with pytest.raises(InvalidInputError, match=r"mode 'scheduled' needs to know what .* costs on this device"):
        BatchGenerator.open(bundle_dir, mode="scheduled", threads=1)


def test_the_ort_lowering_verifies_no_batch_in_one_call(bundle_dir: Path) -> None:
    if not bundle_dir.name.endswith("ort"):
        pytest.skip("another lowering")
    with pytest.raises(InvalidInputError, match="needs a lowering that verifies batches, the bundle's is 'ort'"):
        BatchGenerator.open(bundle_dir, execution="dense", threads=1)


@pytest.mark.parametrize("mode", ["plain", "static"])
def test_packed_graphs_are_taken_where_they_serve(
    packed_bundle_dir: Path, bundle_dir: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    loaded: list[str] = []
    load = OnnxRuntimeEngine._load
    monkeypatch.setattr(OnnxRuntimeEngine, "_load", lambda engine, role: loaded.append(role) or load(engine, role))
    automatic = [(slots, "auto") for slots in (1, 2, 4, 5)]
    for slots, execution in (*automatic, (2, "serial"), (4, "packed"), (1, "packed")):
        loaded.clear()
        with BatchGenerator.open(
            packed_bundle_dir, mode=mode, slots=slots, execution=execution, threads=1
        ) as generator:
            generator.generate(PROMPTS[:2], SamplingParams(max_new_tokens=4))
        packed = slots in (2, 4) and execution != "serial" and (mode != "plain" or execution == "packed")
        expected = {"target"} if mode == "plain" else {"target", "drafter"}
        if packed:  # beside the others, which do what needs no packed graphs
            expected |= {f"{role}_packed" for role in expected}
        assert {role for role in loaded if not role.startswith("sampler")} == expected
    with pytest.raises(InvalidInputError, match="asked for 5 slots, but of this bundle its packed graphs take 4"):
        BatchGenerator.open(packed_bundle_dir, slots=5, execution="packed", threads=1)
    with pytest.raises(InvalidInputError, match=r"has no packed graphs; .* export with --packed-sequences 2"):
        BatchGenerator.open(bundle_dir, slots=1, execution="packed", threads=1)


@pytest.mark.parametrize(("copies", "packed"), [(2, False), (4, True), (None, True)])
def test_packed_graphs_need_room_beside_the_others(
    packed_bundle_dir: Path, monkeypatch: pytest.MonkeyPatch, copies: int | None, packed: bool
) -> None:
    """Where the free memory is not known, it is taken to be enough."""
    with OnnxRuntimeEngine(Bundle.open(packed_bundle_dir), threads=1) as engine:
        size = sum(file.size for file in engine.bundle.manifest.files)
        found = Memory(total=None, available=None if copies is None else copies * size, limit=None)
        monkeypatch.setattr("dspark_edge.runtime.batching.executor.probe_memory", lambda root: found)
        assert choose_grouping(engine, "auto", slots=4, drafting=True).packed == packed
        assert choose_grouping(engine, "packed", slots=4, drafting=True).packed, "who asks for it gets it"


def test_packed_rounds_make_one_call_for_all(packed_bundle_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their verify lengths, as long as one verifies something: also where only some draft."""
    widths: list[list[int]] = []  # of the packed graph's calls
    others: list[int] = []  # requests of the other's
    run = TargetCalls.run

    def noting(calls: TargetCalls, first: int, token_ids: Any, starts: Any) -> None:
        if isinstance(calls, PackedTargetCalls):
            widths.append([len(ids) for ids in token_ids])
        else:
            others.append(len(token_ids))
        run(calls, first, token_ids, starts)

    monkeypatch.setattr(TargetCalls, "run", noting)
    params = [SamplingParams(max_new_tokens=length, ignore_eos=True) for length in LENGTHS]
    with BatchGenerator.open(packed_bundle_dir, slots=4, threads=1, **MODES["scheduled"]) as generator:
        answers = answer_all(generator, params, at_once=4)
        rounds = generator.statistics.rounds
    assert sum(map(len, widths)) + sum(others) == sum(answer.statistics.rounds for answer in answers) == rounds
    assert all(len(of_call) > 1 and max(of_call) > 1 for of_call in widths), "plain steps are the other graphs'"
    assert any(len(set(of_call)) > 1 for of_call in widths), "all lengths were the same"


def test_the_engine_is_closed_when_opening_fails(bundle_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    copytree(bundle_dir, broken)
    (broken / "calibration.json").write_text("{")
    with pytest.raises(BundleError, match="damaged"):
        BatchGenerator.open(broken, mode="static", threads=1)
    with pytest.raises(EngineError, match="has no NoSuchProvider"):
        BatchGenerator.open(bundle_dir, provider="NoSuchProvider")


def test_onnx_runtime_has_nothing_to_warn_about(either_bundle: Path) -> None:
    """Caches that are copied instead of updated in place show as a warning on stderr."""
    program = (
        "import sys; from dspark_edge.runtime import SamplingParams\n"
        "from dspark_edge.runtime.batching import BatchGenerator\n"
        "for mode in ('plain', 'static'):\n"
        "    with BatchGenerator.open(sys.argv[1], mode=mode, slots=3, prefill_chunk=4, threads=1) as generator:\n"
        "        for temperature in (0.0, 1.0):\n"
        "            params = SamplingParams(max_new_tokens=9, temperature=temperature)\n"
        "            generator.generate([[104] * 9, [105], [106, 107], [108]], params)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(either_bundle)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
