"""Admission, rounds and endings, on an executor without weights."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from dspark_edge.engines.errors import CapacityError, DSparkError, EngineError, InvalidInputError
from dspark_edge.runtime import SamplingParams
from dspark_edge.runtime.batching import BatchOptions, ClosedError, Event, QueueFullError, Ticket
from dspark_edge.runtime.batching.grouping import DenseGrouping, Grouping, SerialGrouping

from ..scripted import TableCosts
from .scripted_batch import ScriptedExecutor, make_generator, script_answer

PROMPTS = [[index, *range(length)] for index, length in enumerate((3, 20, 1, 7, 40, 2, 11, 5, 33, 4))]
LENGTHS = [7, 19, 1, 12, 5, 30, 2, 8, 3, 25]
CHEAP = TableCosts(target=(1.0, 1.01, 1.02, 1.03, 1.04, 1.05), draft=0.05)
DEAR = TableCosts(target=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0), draft=0.5)


def greedy(length: int | None, **values: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=length, **values)


@pytest.mark.parametrize("slots", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "options", [{"mode": "plain"}, {}, {"verify_length": 2}, {"costs": CHEAP}, {"costs": DEAR}], ids=str
)
def test_every_answer_is_its_own(slots: int, options: dict[str, Any]) -> None:
    """Requests of many lengths join while others decode, and leave at their own ends."""
    executor = ScriptedExecutor()
    with make_generator(executor, slots=slots, prefill_chunk=8, **options) as generator:
        pending = list(zip(PROMPTS, LENGTHS, strict=True))
        tickets: list[Ticket] = []
        events: list[Event] = []
        while pending or not generator.idle:
            for prompt, length in pending[:2]:  # two more before every step
                tickets.append(generator.submit(prompt, greedy(length)))
            del pending[:2]
            events += generator.step()
            assert generator.active <= slots
    for ticket, prompt, length in zip(tickets, PROMPTS, LENGTHS, strict=True):
        answer = ticket.result()
        assert answer.token_ids == script_answer(prompt, length)
        assert (answer.finish_reason, len(answer.log_probs)) == ("length", length)
        own = [event for event in events if event.request_id == ticket.request_id]
        assert tuple(token for event in own for token in event.token_ids) == answer.token_ids
        assert [event.generation for event in own] == [None] * (len(own) - 1) + [answer]


def test_static_rounds_are_those_of_a_single_stream() -> None:
    with make_generator(ScriptedExecutor(right=3), slots=4) as generator:
        answers = generator.generate(PROMPTS, greedy(21))
    for answer in answers:
        assert answer.statistics.accepted_lengths == (4,) * 5  # one token is the prefill's
        assert answer.statistics.verify_length_counts == (0, 0, 0, 0, 0, 5)


def test_a_round_is_one_call_of_all_that_decode() -> None:
    executor = ScriptedExecutor()
    with make_generator(executor, slots=4, mode="plain") as generator:
        generator.generate([[1], [2], [3], [4]], greedy(6))
    # One prefill a step; then all four in every round, until they leave one after another.
    assert [size for kind, size in executor.calls if kind == "verify"] == [1, 2, 3, 4, 4, 3, 2, 1]


def test_requests_are_served_first_come_first_served() -> None:
    with make_generator(ScriptedExecutor(), slots=2, mode="plain") as generator:
        tickets = [generator.submit([index], greedy(4)) for index in range(6)]
        ended = [event.request_id for event in generator.run() if event.generation is not None]
    assert ended == [ticket.request_id for ticket in tickets]


def test_a_long_prompt_does_not_stall_the_others() -> None:
    executor = ScriptedExecutor(capacity=4000)
    with make_generator(executor, slots=4, mode="plain", prefill_chunk=64) as generator:
        early = generator.submit([1, 2], greedy(60))
        generator.step()
        executor.calls.clear()
        long = generator.submit([3] * 2000, greedy(2))
        late = generator.submit([4, 5], greedy(5))
        first: dict[int, int] = {}
        for step in range(50):
            for event in generator.step():
                first.setdefault(event.request_id, step)
        list(generator.run())
    kinds = [kind for kind, _ in executor.calls]
    chunks = [size for kind, size in executor.calls if kind == "prefill"]
    assert max(chunks) == 64 and sum(chunks) == 2002
    # Between two rounds of those who decode there is one chunk at most: the gap is bounded.
    assert "prefill prefill" not in " ".join(kinds)
    assert kinds.count("verify") >= kinds.count("prefill")
    # The short prompt behind the long one waits for one chunk of it, not for all 32.
    assert (first[early.request_id], first[late.request_id]) == (0, 1)
    assert first[long.request_id] == 32
    assert long.result().token_ids == script_answer([3] * 2000, 2)


def test_two_long_prompts_take_turns() -> None:
    executor = ScriptedExecutor()
    with make_generator(executor, slots=3, prefill_chunk=10) as generator:
        tickets = [generator.submit([index] * length, greedy(1)) for index, length in enumerate((40, 30, 25))]
        ended = [event.request_id for event in generator.run()]
    assert [size for _, size in executor.calls] == [10, 10, 10, 10, 10, 10, 10, 10, 5, 10]
    assert ended == [tickets[index].request_id for index in (1, 2, 0)]


def test_the_queue_is_bounded() -> None:
    with make_generator(ScriptedExecutor(), slots=1, queue=2) as generator:
        first = [generator.submit([1], greedy(3)) for _ in range(2)]
        with pytest.raises(QueueFullError, match="2 requests wait already") as raised:
            generator.submit([2], greedy(3))
        assert isinstance(raised.value, DSparkError) and not isinstance(raised.value, InvalidInputError)
        generator.step()
        third = generator.submit([2], greedy(3))
        list(generator.run())
    assert all(ticket.done for ticket in (*first, third))


def test_generate_takes_more_prompts_than_the_queue_holds() -> None:
    with make_generator(ScriptedExecutor(), slots=2, queue=1) as generator:
        answers = generator.generate(PROMPTS, greedy(9))
    assert [answer.token_ids for answer in answers] == [script_answer(prompt, 9) for prompt in PROMPTS]


def test_generate_drops_what_it_queued_when_a_prompt_is_refused() -> None:
    with make_generator(ScriptedExecutor(), slots=1) as generator:
        with pytest.raises(InvalidInputError, match="the prompt is empty"):
            generator.generate([[1], []], greedy(5))
        assert [event.generation.finish_reason for event in generator.run() if event.generation] == ["cancelled"]


@pytest.mark.parametrize(
    ("prompt", "params", "kind", "problem"),
    [
        ([], greedy(1), InvalidInputError, "the prompt is empty"),
        ([1] * 31, greedy(1), CapacityError, "the prompt has 31 tokens, the bundle's capacity is 30"),
        ([50], greedy(1), InvalidInputError, "50 is outside the vocabulary of 50"),
        ([True], greedy(1), InvalidInputError, "True is outside the vocabulary"),
        ("text", greedy(1), InvalidInputError, "the bundle has no tokenizer, which a text prompt needs"),
        ([1], greedy(1, stop=("x",)), InvalidInputError, "a stop text needs"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(prompt: Any, params: SamplingParams, kind: Any, problem: str) -> None:
    with make_generator(ScriptedExecutor(capacity=30)) as generator:
        with pytest.raises(kind, match=problem):
            generator.submit(prompt, params)
        assert generator.idle


@pytest.mark.parametrize("grouping", [DenseGrouping(), SerialGrouping()], ids=["dense", "serial"])
@pytest.mark.parametrize("options", [{"mode": "plain"}, {}, {"costs": CHEAP}], ids=str)
def test_a_request_that_fills_its_cache_leaves_the_others_alone(grouping: Grouping, options: dict[str, Any]) -> None:
    executor = ScriptedExecutor(capacity=30, grouping=grouping)
    with make_generator(executor, slots=4, **options) as generator:
        tickets = [generator.submit([1] * 29, greedy(None)), generator.submit([2] * 30, greedy(None))]
        tickets += [generator.submit([3] * 11, greedy(None)), generator.submit([4], greedy(20))]
        list(generator.run())
    for ticket, prompt, length in zip(tickets, ([1] * 29, [2] * 30, [3] * 11, [4]), (2, 1, 20, 20), strict=True):
        answer = ticket.result()
        assert (answer.token_ids, answer.finish_reason) == (script_answer(prompt, length), "length")


def test_a_stop_token_cuts_inside_an_accepted_block() -> None:
    whole = script_answer([5], 30)
    for position in (0, 2, 9):
        eos = whole[position]
        with make_generator(ScriptedExecutor(), eos=[eos]) as generator:
            (answer,) = generator.generate([[5]], greedy(30))
            (ignoring,) = generator.generate([[5]], greedy(30, ignore_eos=True))
        assert (answer.token_ids, answer.finish_reason) == (whole[: whole.index(eos) + 1], "stop")
        assert ignoring.token_ids == whole


def test_cancelling_in_the_queue() -> None:
    with make_generator(ScriptedExecutor(), slots=1) as generator:
        runs, waits = generator.submit([1], greedy(9)), generator.submit([2], greedy(9))
        generator.step()
        waits.cancel()
        events = list(generator.run())
    (last,) = (event for event in events if event.request_id == waits.request_id)
    assert (waits.result().finish_reason, waits.result().token_ids) == ("cancelled", ())
    assert last.generation == waits.result()
    assert runs.result().token_ids == script_answer([1], 9)


def test_cancelling_in_prefill() -> None:
    executor = ScriptedExecutor()
    with make_generator(executor, slots=2, prefill_chunk=4) as generator:
        long, other = generator.submit([1] * 20, greedy(9)), generator.submit([2] * 20, greedy(9))
        generator.step()
        long.cancel()
        list(generator.run())
        assert sum(size for kind, size in executor.calls if kind == "prefill") == 24
    assert (long.result().finish_reason, long.result().token_ids) == ("cancelled", ())
    assert other.result().token_ids == script_answer([2] * 20, 9)


def test_cancelling_in_decode() -> None:
    with make_generator(ScriptedExecutor(), slots=3, mode="plain") as generator:
        tickets = [generator.submit([index], greedy(20)) for index in range(3)]
        for _ in range(6):
            generator.step()
        tickets[0].cancel()
        (event, *_) = generator.step()
        assert event.request_id == tickets[0].request_id and event.generation is not None
        tickets[0].cancel()  # does nothing to one that has ended
        later = generator.submit([9], greedy(20))
        list(generator.run())
    answer = tickets[0].result()
    assert answer.finish_reason == "cancelled"
    assert answer.token_ids == script_answer([0], 7)  # the prefill's, and six rounds
    for ticket, prompt in ((tickets[1], [1]), (tickets[2], [2]), (later, [9])):
        assert ticket.result().token_ids == script_answer(prompt, 20)


@pytest.mark.parametrize("kind", ["prefill", "draft", "verify"])
def test_a_failure_ends_every_request_and_closes(kind: str) -> None:
    executor = ScriptedExecutor(failing=lambda call: call == kind and len(executor.calls) > 5)
    generator = make_generator(executor, slots=2, prefill_chunk=4)
    done = generator.submit([1], greedy(1))
    tickets = [generator.submit([index] * 9, greedy(90)) for index in range(4)]
    with pytest.raises(EngineError, match=f"{kind}: the backend failed") as raised:
        list(generator.run())
    assert done.result().token_ids == script_answer([1], 1)
    for ticket in tickets:
        assert ticket.done and ticket.error is raised.value
        with pytest.raises(EngineError, match="the backend failed"):
            ticket.result()
    assert executor.closed == 1
    with pytest.raises(ClosedError, match="the generator is closed"):
        generator.submit([1])
    with pytest.raises(ClosedError, match="the generator is closed"):
        generator.step()
    generator.close()


def test_closing_ends_what_runs_and_what_waits() -> None:
    executor = ScriptedExecutor()
    with make_generator(executor, slots=1) as generator:
        tickets = [generator.submit([index], greedy(9)) for index in range(3)]
        generator.step()
    assert executor.closed == 1
    for ticket in tickets:
        with pytest.raises(ClosedError, match="closed before the request had its answer"):
            ticket.result()


def test_a_result_is_refused_before_the_end() -> None:
    with make_generator(ScriptedExecutor()) as generator:
        ticket = generator.submit([1], greedy(9))
        with pytest.raises(InvalidInputError, match="request 0 has not ended"):
            ticket.result()
        assert ticket.error is None and not ticket.done


def test_only_one_thread_steps() -> None:
    problems: list[DSparkError] = []

    def step_again(call: str) -> bool:
        try:
            generator.step()
        except InvalidInputError as error:
            problems.append(error)
        return False

    with make_generator(ScriptedExecutor(failing=step_again)) as generator:
        (answer,) = generator.generate([[1]], greedy(2))
    assert answer.token_ids == script_answer([1], 2)
    assert problems and "another thread is in a step" in str(problems[0])


def test_threads_submit_and_wait_while_one_steps() -> None:
    answers: dict[int, tuple[int, ...]] = {}

    def ask(index: int) -> None:
        ticket = generator.submit([index], greedy(12))
        answers[index] = ticket.result(timeout=60).token_ids

    with make_generator(ScriptedExecutor(), slots=3) as generator:
        threads = [threading.Thread(target=ask, args=(index,)) for index in range(12)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            generator.step()
        for thread in threads:
            thread.join()
    assert answers == {index: script_answer([index], 12) for index in range(12)}


def test_scheduling_verifies_what_pays() -> None:
    """Where verification is nearly free all is verified; where it is dear a hopeless drafter is parked."""
    cheap, dear = ScriptedExecutor(right=5), ScriptedExecutor(right=0)
    with make_generator(cheap, costs=CHEAP, slots=4) as generator:
        generator.generate([[index] for index in range(4)], greedy(60))
    assert sum(map(sum, cheap.lengths)) > 4 * sum(map(len, cheap.lengths))
    with make_generator(dear, costs=DEAR, slots=4) as generator:
        answers = generator.generate([[index] for index in range(4)], greedy(60))
    assert sum(map(sum, dear.lengths)) < 0.1 * sum(map(len, dear.lengths))
    assert sum(size for kind, size in dear.calls if kind == "draft") < 40
    assert all(answer.statistics.predicted_s is not None for answer in answers)


def test_scheduling_gives_requests_of_a_serial_engine_lengths_of_their_own() -> None:
    """One request's confidences are good, the other's are not."""
    executor = ScriptedExecutor(
        right=5, grouping=SerialGrouping(), confidence=lambda one: 0.99 if one.sequence.token_ids[0] else 0.02
    )
    costs = TableCosts(target=(1.0, 1.2, 1.4, 1.6, 1.8, 2.0), draft=0.05)
    with make_generator(executor, costs=costs, slots=2) as generator:
        tickets = [generator.submit([index], greedy(40)) for index in range(2)]
        list(generator.run())
    bad, good = (ticket.result().statistics for ticket in tickets)
    assert good.draft_tokens > 2 * good.rounds and bad.draft_tokens < 0.5 * bad.rounds


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"mode": "fast"}, "unknown mode 'fast'"),
        ({"execution": "odd"}, "unknown execution 'odd'"),
        ({"slots": 0}, "slots is 0"),
        ({"queue": 0}, "queue is 0"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"verify_length": 0}, "verify_length is 0"),
        ({"mode": "plain", "verify_length": 2}, "verify_length is of mode 'static'"),
    ],
)
def test_options_out_of_range_are_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        BatchOptions(**values)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="verify_length is 6, the drafter's block has 5"):
        make_generator(ScriptedExecutor(), verify_length=6)
    with pytest.raises(InvalidInputError, match="mode 'scheduled' needs a policy"):
        make_generator(ScriptedExecutor(), mode="scheduled")


def test_without_a_number_chunks_follow_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A made-up clock: a prompt token takes 5 ms, a round of decoding 60 ms."""
    now = [0.0]
    monkeypatch.setattr("dspark_edge.runtime.batching.batch_generator.perf_counter", lambda: now[0])

    class Timed(ScriptedExecutor):
        def prefill(self, slot: int, request: Any, count: int) -> Any:
            now[0] += 0.005 * count
            return super().prefill(slot, request, count)

        def verify(self, requests: Any, drafts: Any, lengths: Any) -> Any:
            now[0] += 0.06
            return super().verify(requests, drafts, lengths)

    executor = Timed(capacity=4000)
    with make_generator(executor, slots=2, mode="plain") as generator:
        generator.submit([1] * 100, greedy(300))
        for _ in range(20):
            generator.step()
        executor.calls.clear()
        long = generator.submit([3] * 1000, greedy(2))
        list(generator.run())
    chunks = [size for kind, size in executor.calls if kind == "prefill"]
    assert chunks[:4] == [8, 8, 16, 16] and set(chunks[4:-1]) == {16}  # of 90 ms that one may take, it takes 80
    assert long.result().token_ids == script_answer([3] * 1000, 2)
    assert BatchOptions().paced and not BatchOptions(prefill_chunk=64).paced and not BatchOptions(bit_exact=True).paced
