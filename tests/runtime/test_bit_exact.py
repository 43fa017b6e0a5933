"""Bit-exact mode: tokens and log-probabilities have the same bits, however and beside whom they are decoded.

Drafters are the bundle's own, prompt lookup, and one that knows the answer and is right for 0, 1 … γ tokens by turns,
so that tokens come out of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Buffer, Call, Engine
from dspark_edge.engines.errors import CapacityError, EngineError, InvalidInputError
from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine
from dspark_edge.runtime import Generation, Generator, GeneratorOptions, SamplingParams
from dspark_edge.runtime import model as model_module
from dspark_edge.runtime.batching import BatchGenerator, BatchOptions, GroupScheduling
from dspark_edge.runtime.batching.drafting import CallObserver, LookupDrafter, SlotDrafter
from dspark_edge.runtime.batching.executor import ModelExecutor
from dspark_edge.runtime.batching.grouping import SingleGrouping, TargetCall
from dspark_edge.runtime.bit_exact import exact_width
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.encoding import PromptEncoder
from dspark_edge.runtime.ngram import NgramDrafter
from dspark_edge.runtime.profile_probe import EngineView
from dspark_edge.runtime.round import NO_DRAFT, Candidates, Draft, Drafter, Request, Round
from dspark_edge.runtime.scheduled_policy import StreamScheduling
from dspark_edge.runtime.scheduling import EarlyStop, FixedWidth, Lagged, LookAhead, Proposal, Scheduler, Threshold

from ..conftest import runs_lowering
from .scripted import TableCosts, Unobserved

BLOCK = 7
WIDTH = BLOCK + 1
TEXT = b"the cat sat on the mat and the dog sat on the log and so on and on, the cat and the dog and the mat and the lo"
PROMPTS = [list(TEXT[start : start + length]) for start, length in ((0, 14), (3, 70), (9, 1), (20, 64))]
PARAMS = [SamplingParams(max_new_tokens=length, ignore_eos=True) for length in (40, 12, 20, 16)]
COSTS = TableCosts(target=(1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35), draft=0.05)
ROLES = ("sampler_greedy", "sampler", "sampler_filtered")

Bits = tuple[tuple[int, ...], tuple[float, ...]]


def bits_of(answer: Generation) -> Bits:
    """Floats that compare as equal have equal bits, but for zeros; a log-probability of 0 has no sign worth a test."""
    return answer.token_ids, answer.log_probs


@pytest.fixture(
    scope="module",
    params=["fp32-ort", "fp32-decomposed", "fp32-onnx", "int8-ort", "int4-ort"],
)
def any_bundle(request: pytest.FixtureRequest, reference_dir: Path, export_once: Callable[..., Path]) -> Path:
    """The reference pair, capacity 256, in every lowering and in fewer bits."""
    precision, lowering = request.param.split("-")
    if not runs_lowering(lowering, "dspark"):
        pytest.skip("this ONNX Runtime is too old for the lowering")
    kept = Path(__file__).parents[1] / "data" / "bundles" / f"qwen3_rnn_{lowering}"
    if precision == "fp32" and kept.exists():
        return kept
    options = {"precision": precision, "lowering": lowering, "capacity": 256}
    pair = reference_dir / "qwen3_target", reference_dir / "qwen3_rnn"
    return export_once(f"bit-exact-{request.param}", *pair, **options)


@pytest.fixture(scope="module")
def any_engine(any_bundle: Path) -> Iterator[EngineView]:
    """Graphs are loaded once; whoever closes it closes nothing."""
    with OnnxRuntimeEngine(Bundle.open(any_bundle), threads=1) as engine:
        yield EngineView(engine)


def make_stream(engine: Engine, mode: str) -> Generator:
    return Generator(engine, GeneratorOptions(mode, bit_exact=True))


def make_batch(engine: Engine, mode: str, slots: int) -> BatchGenerator:
    executor = ModelExecutor(engine, slots, SingleGrouping(WIDTH), mode != "plain", 64)
    return BatchGenerator(executor, PromptEncoder.of(engine.bundle), BatchOptions(mode, slots=slots, bit_exact=True))


@pytest.fixture(scope="module")
def expected(any_engine: Engine) -> list[Generation]:
    """Each prompt answered alone, plainly, by a generator that has seen nothing else."""
    return [
        make_stream(any_engine, "plain").generate(prompt, params)
        for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]


@dataclass
class Oracle:
    """Knows the answers, by prompt; right for 0, 1 … γ tokens by turns."""

    answers: Mapping[tuple[int, ...], Sequence[int]]
    turn: int = 0

    def tokens_after(self, request: Request) -> tuple[int, ...]:
        sequence = request.sequence
        answer = self.answers[tuple(sequence.token_ids[: sequence.prompt_length])]
        right = self.turn % (BLOCK + 1)
        self.turn += 3
        known = list(answer[sequence.num_new :][:BLOCK])
        known += [0] * (BLOCK - len(known))
        return tuple(token if step < right else (token + 1) % 250 for step, token in enumerate(known))


class OracleDrafter:
    """For a slot, or for several."""

    block_size = BLOCK

    def __init__(self, engine: Engine, oracle: Oracle, slots: int = 1) -> None:
        self.oracle = oracle
        self.candidates = Candidates(
            engine.allocate("int64", (slots, BLOCK)),
            engine.allocate("int64", (slots, BLOCK, 1)),
            engine.allocate("float32", (slots, BLOCK, 1)),
        )
        self.candidates.candidate_probs.write(1.0)

    def draft(self, request: Request, length: int = 0) -> Draft:
        return self._draft(0, request)

    def _draft(self, slot: int, request: Request) -> Draft:
        token_ids = self.oracle.tokens_after(request)
        self.candidates.draft_ids.read()[slot] = token_ids
        self.candidates.candidate_ids.read()[slot, :, 0] = token_ids
        return Draft(token_ids, None, self.candidates)


class OracleSlotDrafter(OracleDrafter):
    def draft(  # type: ignore[override]
        self, requests: Sequence[Request], drafting: Sequence[bool], observer: CallObserver | None
    ) -> list[Draft]:
        wanted = enumerate(zip(requests, drafting, strict=True))
        return [self._draft(slot, request) if wants else NO_DRAFT for slot, (request, wants) in wanted]


class ChosenExecutor(ModelExecutor):
    """With another drafter than the bundle's; real times do not correct made-up costs."""

    def __init__(self, engine: Engine, slots: int, make: Callable[[Engine, int], SlotDrafter] | None) -> None:
        self._make = make
        super().__init__(engine, slots, SingleGrouping(WIDTH), True, 64)

    def _make_drafter(self, slots: int, calibration: Calibration | None) -> SlotDrafter:
        if self._make is None:
            return super()._make_drafter(slots, calibration)
        return self._make(self._engine, slots)

    def observe(self, observer: CallObserver | None) -> None:
        super().observe(None)


SCHEDULES: dict[str, tuple[dict[str, Any], Scheduler | None]] = {
    "static": ({"mode": "static"}, None),
    "scheduled": ({"mode": "scheduled"}, LookAhead()),
    "threshold": ({"mode": "scheduled"}, Threshold(0.4)),
}


def stream_answers(
    engine: Engine, schedule: str, make: Callable[[Engine], Drafter] | None, rounds: list[Round] | None = None
) -> list[Generation]:
    options, scheduler = SCHEDULES[schedule]
    scheduling = Unobserved(dict.fromkeys(ROLES, COSTS), BLOCK, scheduler, width=WIDTH) if scheduler else None
    chosen, observer = GeneratorOptions(**options, bit_exact=True), None if rounds is None else rounds.append
    generator = Generator(engine, chosen, make, observer, scheduling=scheduling)
    return [generator.generate(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


def batch_answers(
    engine: Engine, schedule: str, make: Callable[[Engine, int], SlotDrafter] | None, slots: int
) -> list[Generation]:
    """One request joins before every step."""
    options, scheduler = SCHEDULES[schedule]
    executor = ChosenExecutor(engine, slots, make)
    policy = GroupScheduling(COSTS, executor.pricing, BLOCK, scheduler) if scheduler else None
    chosen = BatchOptions(**options, slots=slots, bit_exact=True)
    tickets = []
    generator = BatchGenerator(executor, PromptEncoder.of(engine.bundle), chosen, policy)
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        tickets.append(generator.submit(prompt, params))
        generator.step()
    list(generator.run())
    return [ticket.result() for ticket in tickets]


@pytest.fixture(params=["own", "lookup", "oracle"])
def drafters(
    request: pytest.FixtureRequest, expected: list[Generation]
) -> tuple[Callable[[Engine], Drafter] | None, Callable[[Engine, int], SlotDrafter] | None]:
    """One for a single stream and one for slots."""
    if request.param == "own":
        return None, None
    if request.param == "lookup":
        return lambda engine: NgramDrafter(engine, BLOCK), lambda engine, slots: LookupDrafter(engine, slots, BLOCK)
    oracle = Oracle({tuple(prompt): one.token_ids for prompt, one in zip(PROMPTS, expected, strict=True)})
    return lambda engine: OracleDrafter(engine, oracle), lambda engine, slots: OracleSlotDrafter(engine, oracle, slots)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_drafter_schedule_or_neighbour_changes_a_bit(
    any_engine: Engine, expected: list[Generation], drafters: Any, schedule: str
) -> None:
    wanted = [bits_of(one) for one in expected]
    for_stream, for_slots = drafters
    answers = stream_answers(any_engine, schedule, for_stream)
    assert [bits_of(one) for one in answers] == wanted
    assert any(one.statistics.draft_tokens for one in answers)
    for slots in (1, 4):
        assert [bits_of(one) for one in batch_answers(any_engine, schedule, for_slots, slots)] == wanted


def test_every_row_has_been_read(any_engine: Engine, expected: list[Generation]) -> None:
    """The oracle's answers come out of rounds of all accepted lengths: the test above looks at all rows."""
    oracle = Oracle({tuple(prompt): one.token_ids for prompt, one in zip(PROMPTS, expected, strict=True)})
    rounds: list[Round] = []
    stream_answers(any_engine, "static", lambda engine: OracleDrafter(engine, oracle), rounds)
    assert {one.accepted_length for one in rounds} == set(range(1, WIDTH + 1))


@pytest.mark.parametrize("slots", [1, 4])
def test_plain_batches(any_engine: Engine, expected: list[Generation], slots: int) -> None:
    generator = make_batch(any_engine, "plain", slots)
    tickets = [generator.submit(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    list(generator.run())
    assert [bits_of(ticket.result()) for ticket in tickets] == [bits_of(one) for one in expected]


def test_growing_caches_change_no_bit(
    any_engine: Engine, expected: list[Generation], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_module, "_FIRST_CAPACITY", 16)
    wanted = [bits_of(one) for one in expected]
    assert [bits_of(one) for one in stream_answers(any_engine, "static", None)] == wanted
    assert [bits_of(one) for one in batch_answers(any_engine, "static", None, 4)] == wanted


@pytest.mark.parametrize("mode", ["plain", "static"])
def test_a_turn_in_a_conversation_is_what_a_fresh_prompt_is(any_engine: Engine, mode: str) -> None:
    some = SamplingParams(max_new_tokens=20, ignore_eos=True)
    reused, turns = [], [list((TEXT * 2)[:150])]
    talking, fresh = make_stream(any_engine, mode), make_stream(any_engine, "plain")
    for turn in range(4):
        answer = talking.generate(turns[-1], some)
        fresh.reset()
        assert bits_of(answer) == bits_of(fresh.generate(turns[-1], some))
        reused.append(answer.statistics.cached_prompt_tokens)
        turns.append([*turns[-1], *answer.token_ids, *TEXT[:5]] if turn < 2 else [*turns[0][:70], 1, 2, 3])
    # Prompts of 150, 175 and 200 tokens, of which whole chunks were prefilled; then one that goes another way at 70.
    assert reused == [0, 128, 128, 64]


@pytest.mark.parametrize("mode", ["plain", "static"])
def test_the_last_slots_are_kept_for_a_whole_call(any_engine: Engine, mode: str) -> None:
    prompt, unlimited = [104, 101] * 115, SamplingParams(max_new_tokens=None, ignore_eos=True)
    generator = make_stream(any_engine, mode)
    assert generator.capacity == 256 - BLOCK
    alone = generator.generate(prompt, unlimited)
    full = generator.generate([104] * 249, unlimited)
    with pytest.raises(CapacityError, match=r"the prompt has 250 tokens, .* capacity is 249"):
        generator.generate([104] * 250)
    assert (len(alone.token_ids), len(full.token_ids)) == (250 - len(prompt), 1)  # the last token needs no slot
    batch = make_batch(any_engine, "static" if mode == "plain" else "plain", 3)
    assert batch.capacity == 256 - BLOCK
    tickets = [batch.submit(one, unlimited) for one in (prompt, [104] * 249, prompt)]
    list(batch.run())
    assert [bits_of(ticket.result()) for ticket in tickets] == [bits_of(one) for one in (alone, full, alone)]


@pytest.mark.parametrize("mode", ["plain", "static"])
def test_draws_of_a_seed_are_those_of_the_same_drafter_alone(any_engine: Engine, mode: str) -> None:
    kinds: list[dict[str, Any]] = [{}, {"top_k": 20, "top_p": 0.95}, {"temperature": 0.0}, {"min_p": 0.01}]
    params = [SamplingParams(**{"max_new_tokens": 12, "temperature": 0.9, "seed": 3, **kind}) for kind in kinds]
    single = make_stream(any_engine, mode)
    wanted = [bits_of(single.generate(prompt, one)) for prompt, one in zip(PROMPTS, params, strict=True)]
    for slots in (1, 4):
        generator = make_batch(any_engine, mode, slots)
        tickets = [generator.submit(prompt, one) for prompt, one in zip(PROMPTS, params, strict=True)]
        list(generator.run())
        assert [bits_of(ticket.result()) for ticket in tickets] == wanted


def test_a_bundle_is_opened_so(bundle_dir: Path) -> None:
    found = []
    for mode in ("plain", "static"):
        with Generator.open(bundle_dir, mode=mode, bit_exact=True, threads=1) as generator:
            found.append(bits_of(generator.generate(PROMPTS[1], PARAMS[1])))
        with BatchGenerator.open(bundle_dir, mode=mode, slots=2, bit_exact=True, threads=1) as batch:
            found += [bits_of(one) for one in batch.generate([PROMPTS[1]] * 2, PARAMS[1])]
    assert len(set(found)) == 1


class RecordingEngine(EngineView):
    """Notes the shapes of the target's calls: batch, width, and rows with logits."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.shapes: list[tuple[int, int, int]] = []

    def bind(self, role: str, buffers: Mapping[str, Buffer]) -> Call:
        call = super().bind(role, buffers)
        if role != "target":
            return call
        batch, width = buffers["input_ids"].shape
        return _Watched(call, lambda: self.shapes.append((batch, width, buffers["logit_rows"].shape[1])))


class _Watched:
    def __init__(self, call: Call, then: Callable[[], None]) -> None:
        self._call, self._then = call, then

    def run(self) -> None:
        self._call.run()
        self._then()


@pytest.fixture
def engine(bundle_dir: Path) -> Iterator[OnnxRuntimeEngine]:
    with OnnxRuntimeEngine(Bundle.open(bundle_dir), threads=1) as opened:
        yield opened


@pytest.mark.parametrize("bit_exact", [True, False])
def test_the_target_is_asked_for_one_shape(engine: OnnxRuntimeEngine, bit_exact: bool) -> None:
    """Without the mode plain and speculative decoding are calls of different shapes."""
    shapes: set[tuple[int, int, int]] = set()
    for mode in ("plain", "static"):
        recording = RecordingEngine(engine)
        generator = Generator(recording, GeneratorOptions(mode, bit_exact=bit_exact))
        recording.shapes.clear()  # of the check of rows
        generator.generate(PROMPTS[1], PARAMS[1])
        chunks = [(1, 64, 1), (1, 6, 1)] if bit_exact else [(1, 70, 1)]
        assert recording.shapes[: len(chunks)] == chunks
        shapes.update(recording.shapes[len(chunks) :])
    assert (shapes == {(1, WIDTH, WIDTH)}) is bit_exact
    if bit_exact:
        recording = RecordingEngine(engine)
        executor = ModelExecutor(recording, 4, SingleGrouping(WIDTH), True, 64)
        recording.shapes.clear()
        batch = BatchGenerator(
            executor, PromptEncoder.of(engine.bundle), BatchOptions("static", bit_exact=True, slots=4)
        )
        batch.generate([[104]] * 4, PARAMS[0])
        assert set(recording.shapes) == {(1, 1, 1), (1, WIDTH, WIDTH)}


class TiltedEngine(EngineView):
    """Gives the last row of a call other bits than the others, as kernels do that take rows in pairs."""

    def bind(self, role: str, buffers: Mapping[str, Buffer]) -> Call:
        call = super().bind(role, buffers)
        if role != "target" or buffers["logit_rows"].shape[1] == 1:
            return call

        def tilt() -> None:
            buffers["logits"].read()[0, -1] *= 1 + 2**-20

        return _Watched(call, tilt)


def test_a_backend_whose_rows_differ_is_refused(engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(EngineError, match="in calls of 8 tokens this backend gives a token other bits in row 7 than"):
        Generator(TiltedEngine(engine), GeneratorOptions(bit_exact=True))
    with pytest.raises(EngineError, match="bit_exact cannot be kept here"):
        ModelExecutor(TiltedEngine(engine), 2, SingleGrouping(WIDTH), False, 64)
    Generator(TiltedEngine(engine), GeneratorOptions())


def test_a_fixed_width_has_one_price() -> None:
    pricing = FixedWidth(COSTS, 3)
    assert pricing.verify_s((0, 2), (5, 9)) == pricing.verify_s((0, 0), (5, 9)) == 2 * COSTS.target[2]
    assert pricing.plain_call((5, 9)) == (1, 3, 5)
    hopeful, nothing = (Proposal(values, values, values, 9, False) for values in ((0.4, 0.1), ()))
    assert [one.seconds for one in pricing.ladders((hopeful, nothing))] == [(1.1, 1.1, 1.1), (1.1,)]
    for scheduler in (LookAhead(), EarlyStop(), Lagged()):
        assert scheduler.lengths((hopeful, nothing), pricing, 1.0) == (2, 0)


def test_every_request_has_a_call_of_its_own() -> None:
    grouping = SingleGrouping(4)
    assert grouping.calls((3, 0), (9, 9)) == (TargetCall(0, (4,), (0,)), TargetCall(1, (4,), (1,)))
    assert not grouping.drafts_together
    assert grouping.pricing(COSTS).verify_s((3, 0), (9, 9)) == 2 * COSTS.target[3]
    assert grouping.pricing(COSTS).costs.draft_s(3, 9) == pytest.approx(3 * COSTS.draft)


def test_scheduling_knows_that_verification_is_free(engine: OnnxRuntimeEngine) -> None:
    """A round costs a call of the whole width, whatever is verified; statistics say so."""
    rounds: list[Round] = []
    scheduling = Unobserved(dict.fromkeys(ROLES, COSTS), BLOCK, width=WIDTH)
    generator = Generator(engine, GeneratorOptions(bit_exact=True), observer=rounds.append, scheduling=scheduling)
    assert generator.options.mode == "scheduled"
    said = generator.generate(PROMPTS[0], PARAMS[0]).statistics
    drafted = [one for one in rounds if one.drafted]
    assert drafted and all(one.verify_length == min(BLOCK, one.drafted) for one in drafted)
    assert said.predicted_s == pytest.approx(0.05 * len(drafted) + COSTS.target[-1] * len(rounds))
    assert said.plain_s == pytest.approx(COSTS.target[-1] * sum(one.accepted_length for one in rounds))


def test_a_drafter_that_is_never_right_is_parked(engine: OnnxRuntimeEngine) -> None:
    """Verification costs nothing, drafting does."""
    rounds: list[Round] = []
    dear = TableCosts(target=COSTS.target, draft=0.5)
    scheduling = Unobserved(dict.fromkeys(ROLES, dear), BLOCK, width=WIDTH)
    wrong = Oracle({tuple(PROMPTS[0]): [251] * 99})
    options = GeneratorOptions(bit_exact=True)
    generator = Generator(engine, options, lambda one: OracleDrafter(one, wrong), rounds.append, scheduling=scheduling)
    generator.generate(PROMPTS[0], SamplingParams(max_new_tokens=80, ignore_eos=True))
    assert sum(one.drafted > 0 for one in rounds) <= len(rounds) // 8


def test_times_are_observed_at_the_width_that_ran(engine: OnnxRuntimeEngine) -> None:
    widths: set[tuple[int, int]] = set()

    class Observed(StreamScheduling):
        def policy(self, params: SamplingParams) -> Any:
            policy = super().policy(params)
            policy._costs.observe_verification = (  # type: ignore[method-assign]
                lambda batch, width, *_: widths.add((batch, width))
            )
            return policy

    scheduling = Observed(dict.fromkeys(ROLES, COSTS), BLOCK, Threshold(0.5), width=WIDTH)
    Generator(engine, GeneratorOptions(bit_exact=True), scheduling=scheduling).generate(PROMPTS[0], PARAMS[0])
    assert widths == {(1, WIDTH)}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"prefill_chunk": 32}, "prefill_chunk is 32, but bit_exact fixes it at 64"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0, expected at least 1"),
    ],
)
def test_a_chunk_of_another_size_is_refused(values: dict[str, Any], problem: str) -> None:
    for options in (GeneratorOptions, BatchOptions):
        with pytest.raises(InvalidInputError, match=problem):
            options(**values, bit_exact=True)
    assert GeneratorOptions(prefill_chunk=64, bit_exact=True).chunk == BatchOptions(bit_exact=True).chunk == 64
    assert (GeneratorOptions().chunk, BatchOptions().chunk) == (256, 64)


def test_an_execution_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="execution is 'serial', but bit_exact makes a call for each request"):
        BatchOptions(execution="serial", bit_exact=True)


def test_what_does_not_fit_the_width_is_refused(engine: OnnxRuntimeEngine) -> None:
    exact = GeneratorOptions(bit_exact=True)
    with pytest.raises(InvalidInputError, match="at most the bundle's block of 7 tokens, the drafter's block has 9"):
        Generator(engine, exact, lambda one: NgramDrafter(one, 9))
    for width, options in ((None, exact), (WIDTH, GeneratorOptions())):
        scheduling = StreamScheduling(dict.fromkeys(ROLES, COSTS), BLOCK, width=width)
        with pytest.raises(InvalidInputError, match=f"the scheduling has the width {width}, expected"):
            Generator(engine, options, scheduling=scheduling)


def test_a_capacity_without_room_for_a_call_is_refused(bundle_dir: Path) -> None:
    manifest = Bundle.open(bundle_dir).manifest
    assert exact_width(replace(manifest, limits=replace(manifest.limits, capacity=8))) == WIDTH
    with pytest.raises(InvalidInputError, match="bit_exact runs 8 tokens a call, the bundle's capacity is 7"):
        exact_width(replace(manifest, limits=replace(manifest.limits, capacity=7)))
