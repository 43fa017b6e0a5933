"""What is asked of the target, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.chat_template import ChatTemplate, Message
from dspark_edge.runtime.prompts import PromptRecord
from dspark_edge.runtime.tokenizer import Tokenizer
from dspark_edge.trainer.responses.plan import SYNTHESISED, Job, ResponseSettings, Script
from tests.runtime.conftest import CHAT_TEMPLATE, byte_tokenizer

END = 256
Answers = Mapping[tuple[str, int, int, int], tuple[int, ...]]
SETTINGS = ResponseSettings(max_new_tokens=16, wave=4, seed=3)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Token i is byte i."""
    return Tokenizer(byte_tokenizer())


MakeScript = Callable[..., Script]


@pytest.fixture
def make_script(tokenizer: Tokenizer) -> MakeScript:
    """`make_script(prompts, settings, template=CHAT_TEMPLATE, capacity=256, model="m")`: a script over bytes."""

    def make(
        prompts: Sequence[PromptRecord],
        settings: ResponseSettings = SETTINGS,
        template: str | None = CHAT_TEMPLATE,
        capacity: int | None = 256,
        model: str = "m",
        vocab_size: int | None = 258,
        openings: Sequence[PromptRecord] = (),
    ) -> Script:
        parsed = None if template is None else ChatTemplate(template)
        return Script(prompts, settings, tokenizer, parsed, capacity, model, vocab_size, openings)

    return make


def asked(script: Script, say: Callable[[Job], str | tuple[int, ...]] = lambda job: "ok") -> list[list[list[Job]]]:
    """All phases, every job answered; a text stands for its bytes and the end."""
    answers: dict[Any, tuple[int, ...]] = {}
    phases = []
    for waves in script.phases(answers):
        phases.append(waves)
        for job in itertools.chain(*waves):
            said = say(job)
            answers[job.key] = (*said.encode(), END) if isinstance(said, str) else said
    return phases


def jobs_of(script: Script, say: Callable[[Job], str | tuple[int, ...]] = lambda job: "ok") -> list[Job]:
    return [job for waves in asked(script, say) for wave in waves for job in wave]


def text_of(job: Job) -> str:
    return bytes(job.question.token_ids).decode()


def some_prompts(count: int = 10, domain: str = "a") -> list[PromptRecord]:
    return [PromptRecord(index + 1, domain, turns=(f"say {'x' * (index * 7 % 10)}{index}",)) for index in range(count)]


def test_the_same_inputs_make_the_same_waves(make_script: MakeScript) -> None:
    settings = replace(SETTINGS, synthesise=6, samples=(("", 2),))
    first, second = (asked(make_script(some_prompts(), settings)) for _ in range(2))
    assert first == second
    other = asked(make_script(some_prompts(), replace(settings, seed=4)))
    assert first != other
    keys = [{job.key for waves in phases for wave in waves for job in wave} for phases in (first, other)]
    assert keys[0] == keys[1]


def test_waves_are_sorted_by_length_inside_and_shuffled_among_each_other(make_script: MakeScript) -> None:
    prompts = [PromptRecord(index + 1, "a", turns=("x" * (index % 50),)) for index in range(100)]
    (waves,) = asked(make_script(prompts))
    assert [len(wave) for wave in waves] == [4] * 25
    spans = [(len(wave[0].question.token_ids), len(wave[-1].question.token_ids)) for wave in waves]
    assert all(last - first <= 2 for first, last in spans)
    assert spans != sorted(spans)
    assert sorted(job.prompt for wave in waves for job in wave) == list(range(100))


def test_only_the_last_wave_by_length_may_be_small(make_script: MakeScript) -> None:
    (waves,) = asked(make_script(some_prompts(10)))
    assert sorted(len(wave) for wave in waves) == [2, 4, 4]


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 17},
        {"samples": (("", 2),)},
        {"samples": (("a", 1),)},
        {"greedy_share": 0.6},
        {"temperature": 0.9},
        {"synthesise": 1},
        {"seed": 4},
        {"wave": 5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_tells_settings_apart(make_script: MakeScript, change: dict[str, Any]) -> None:
    prompts = some_prompts(2)
    digest = make_script(prompts).digest
    assert digest == make_script(prompts, ResponseSettings(max_new_tokens=16, wave=4, seed=3)).digest
    assert digest != make_script(prompts, replace(SETTINGS, **change)).digest


def test_the_digest_tells_prompts_targets_and_capacities_apart(make_script: MakeScript) -> None:
    prompts = some_prompts(2)
    digests = {
        make_script(prompts).digest,
        make_script(prompts[::-1]).digest,
        make_script(prompts[:1]).digest,
        make_script([replace(prompts[0], domain="b"), prompts[1]]).digest,
        make_script(prompts, model="other").digest,
        make_script(prompts, capacity=255).digest,
    }
    assert len(digests) == 6
    # Where a line stands in the file says nothing.
    moved = [replace(record, line=record.line + 5) for record in prompts]
    assert make_script(moved).digest == make_script(prompts).digest


def test_samples_go_by_domain(make_script: MakeScript) -> None:
    prompts = [PromptRecord(1, "math", turns=("m",)), PromptRecord(2, "code", turns=("c",))]
    prompts.append(PromptRecord(3, "chat", turns=("t",)))
    jobs = jobs_of(make_script(prompts, replace(SETTINGS, samples=(("", 2), ("code", 3), ("chat", 0)))))
    assert sorted((job.domain, job.sample) for job in jobs) == [
        *[("code", sample) for sample in range(3)],
        *[("math", sample) for sample in range(2)],
    ]
    drawn = [job.question for job in jobs if job.question.temperature > 0]
    assert len({question.seed for question in drawn}) == len(drawn)
    # One number for one domain leaves the others at one.
    assert len(jobs_of(make_script(prompts, replace(SETTINGS, samples=(("code", 3),))))) == 5


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 40), (0.5, 24)])
def test_a_share_of_the_prompts_gets_one_greedy_response(make_script: MakeScript, share: float, expected: int) -> None:
    settings = replace(SETTINGS, greedy_share=share, temperature=0.7, samples=(("", 3),))
    jobs = jobs_of(make_script(some_prompts(40), settings))
    greedy = [job for job in jobs if job.question.temperature == 0]
    assert len(jobs) == 120 and len(greedy) == expected
    assert all(job.sample == 0 for job in greedy)
    assert {job.question.temperature for job in jobs} - {0.0} == {0.7}


def test_a_larger_share_keeps_those_that_were_greedy(make_script: MakeScript) -> None:
    greedy = [
        {job.prompt for job in jobs_of(make_script(some_prompts(40), replace(SETTINGS, greedy_share=share)))
         if job.question.temperature == 0}
        for share in (0.3, 0.6)
    ]  # fmt: skip
    assert greedy[0] < greedy[1]


def test_a_conversation_is_asked_turn_by_turn(make_script: MakeScript) -> None:
    prompts = [
        PromptRecord(1, "chat", turns=("one", "two", "three")),
        PromptRecord(2, "chat", turns=("alone",)),
        PromptRecord(3, "chat", turns=("hey", "ho")),
    ]
    settings = replace(SETTINGS, samples=(("", 2),), greedy_share=1.0)
    phases = asked(make_script(prompts, settings), lambda job: f" t{job.turn}s{job.sample} ")
    jobs = [[job for wave in waves for job in wave] for waves in phases]
    assert [len(each) for each in jobs] == [6, 4, 2]
    assert [{job.turn for job in each} for each in jobs] == [{0}, {1}, {2}]
    by_key = {job.key: job for each in jobs for job in each}
    assert text_of(by_key["response", 0, 2, 1]) == "u: one\na: t0s1\nu: two\na: t1s1\nu: three\na: "
    assert text_of(by_key["response", 2, 1, 0]) == "u: hey\na: t0s0\nu: ho\na: "
    # A conversation is greedy throughout, or not at all.
    assert all((job.question.temperature == 0) == (job.sample == 0) for job in by_key.values())


def test_only_what_later_phases_stand_on_is_kept(make_script: MakeScript) -> None:
    prompts = [PromptRecord(1, "chat", turns=("one", "two")), PromptRecord(2, "chat", turns=("alone",))]
    settings = replace(SETTINGS, synthesise=3, samples=(("", 2),))

    def say(job: Job) -> str:
        return f"s{job.key}"[:14]

    script = make_script(prompts, settings)
    expected = asked(script, say)
    answers: dict[Any, tuple[int, ...]] = {}
    phases = []
    for waves in script.phases(answers):
        phases.append(waves)
        answers |= {job.key: (*say(job).encode(), END) for wave in waves for job in wave if script.stands_on(job.key)}
    assert phases == expected
    assert sorted({(kind, prompt, turn) for kind, prompt, turn, _ in answers}) == [
        ("prompt", 2, 0),
        ("prompt", 3, 0),
        ("prompt", 4, 0),
        ("response", 0, 0),
    ]


def test_messages_and_token_ids_are_asked_as_they_are(make_script: MakeScript) -> None:
    messages = (Message("system", "be"), Message("user", "hi"))
    prompts = [PromptRecord(1, "a", messages=messages), PromptRecord(2, "a", token_ids=(1, 2, 3))]
    jobs = {job.prompt: job for job in jobs_of(make_script(prompts))}
    assert text_of(jobs[0]) == "s: be\nu: hi\na: "
    assert jobs[1].question.token_ids == (1, 2, 3)


def test_without_a_template_texts_are_asked_as_they_are(make_script: MakeScript) -> None:
    (job,) = jobs_of(make_script([PromptRecord(1, "a", turns=("raw",))], template=None))
    assert text_of(job) == "raw"
    with pytest.raises(InvalidInputError, match="prompts, line 4: the target has no chat template"):
        make_script([PromptRecord(4, "a", messages=(Message("system", "s"), Message("user", "u")))], template=None)


SAID = ("Why?", " Why? ", "", "   ", "What is it?", "x" * 16, "y" * 15)


def test_prompts_are_synthesised_and_answered(make_script: MakeScript) -> None:
    settings = replace(SETTINGS, synthesise=len(SAID), samples=((SYNTHESISED, 2),), greedy_share=0.5)

    def say(job: Job) -> str | tuple[int, ...]:
        if job.kind == "response":
            return "ok"
        text = SAID[job.prompt - 1].encode()
        return text[:16] if len(text) >= 16 else (*text, END)  # type: ignore[return-value]

    written, answered = asked(make_script([PromptRecord(1, "a", turns=("mine",))], settings), say)
    asking = [job for wave in written for job in wave]
    assert {text_of(job) for job in asking} == {"u: "}  # the template up to where the user speaks
    assert sorted(job.prompt for job in asking) == list(range(1, 8)) and {job.domain for job in asking} == {SYNTHESISED}
    assert len({job.question.seed for job in asking}) == 7 and {job.question.temperature for job in asking} == {1.0}
    # Cut, empty and doubled ones are dropped; the text of 15 bytes and its end is as long as a cut one.
    responses = sorted((job.prompt, job.sample, text_of(job)) for wave in answered for job in wave)
    assert responses == [
        (0, 0, "u: mine\na: "),
        (1, 0, "u: Why?\na: "),
        (1, 1, "u: Why?\na: "),
        (5, 0, "u: What is it?\na: "),
        (5, 1, "u: What is it?\na: "),
    ]
    greedy = [job for wave in answered for job in wave if job.question.temperature == 0]
    assert greedy and all(job.sample == 0 for job in greedy)


def test_a_synthesised_prompt_without_file(make_script: MakeScript) -> None:
    written, answered = asked(make_script([], replace(SETTINGS, synthesise=2)), lambda job: f"p{job.prompt}")
    assert sorted(text_of(job) for wave in answered for job in wave) == ["u: p0\na: ", "u: p1\na: "]
    assert sorted(job.prompt for wave in written for job in wave) == [0, 1]


QUOTING = "[{% for m in messages %}{{ m.content | tojson }}{% endfor %}]"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "the target has no chat template"),
        ("{% for m in messages %}u: {{ m.content | upper }}{% endfor %}", "the chat template changes what the user"),
        ("{% for m in messages %}u: {{ m.content | e }}{% endfor %}", "the chat template changes what the user says"),
        (QUOTING, "the chat template changes what the user says"),
        ("always the same", "the chat template changes what the user says"),
        ("{{ messages[0].content }}\n", "the chat template begins with what the user says"),
        ("x" * 241 + CHAT_TEMPLATE, "244 tokens of the chat template and max_new_tokens, 16, pass the capacity of 256"),
    ],
)
def test_templates_that_no_prompt_can_be_synthesised_with(
    make_script: MakeScript, template: str | None, problem: str
) -> None:
    with pytest.raises(InvalidInputError, match=f"prompts cannot be synthesised: {problem}"):
        make_script([], replace(SETTINGS, synthesise=1), template)


def test_a_template_that_changes_texts_still_asks(make_script: MakeScript) -> None:
    upper = "{% for m in messages %}u: {{ m.content | upper }}{% endfor %}"
    (job,) = jobs_of(make_script([PromptRecord(1, "a", turns=("quiet",))], template=upper))
    assert text_of(job) == "u: QUIET"
    (job,) = jobs_of(make_script([PromptRecord(1, "a", turns=('a "b"',))], template=QUOTING))
    assert text_of(job) == '["a \\"b\\""]'


def test_what_does_not_fit_is_counted(make_script: MakeScript) -> None:
    prompts = [
        PromptRecord(1, "a", turns=("x" * 20,)),
        PromptRecord(2, "a", turns=("x" * 40,)),
        PromptRecord(3, "a", turns=("x", "y" * 9, "z")),
    ]
    script = make_script(prompts, replace(SETTINGS, samples=(("", 2),)), capacity=44)  # 28 for the prompt
    phases = asked(script, lambda job: "a" * 12)
    assert [sorted({job.prompt for wave in waves for job in wave}) for waves in phases] == [[0, 2], [], []]
    # Two samples of the long prompt, and of the conversation's second turn; its third is never asked.
    assert script.skipped == 4
    asked(script, lambda job: "a" * 12)
    assert script.skipped == 4
    assert jobs_of(make_script(prompts[1:2], capacity=None))[0].prompt == 0


REFUSING = "{% if messages[0].content == 'x' %}{{ raise_exception('no, thanks') }}{% endif %}u: "


@pytest.mark.parametrize(
    ("record", "template", "problem"),
    [
        (PromptRecord(7, "a", turns=("",)), None, "the prompt is empty; give at least one token"),
        (PromptRecord(7, "a", turns=("x",)), REFUSING, "refuses these messages: no, thanks"),
        (PromptRecord(7, "a", turns=("\ud800",)), CHAT_TEMPLATE, "a lone surrogate"),
        (PromptRecord(7, "a", token_ids=(1, 258)), CHAT_TEMPLATE, "token id 258 is outside the target's vocabulary"),
    ],
)
def test_a_prompt_that_cannot_be_asked_is_named_at_once(
    make_script: MakeScript, record: PromptRecord, template: str | None, problem: str
) -> None:
    with pytest.raises(InvalidInputError, match=problem) as caught:
        make_script([*some_prompts(2), record], template=template)
    assert str(caught.value).startswith("prompts, line 7: ")


def test_samples_of_no_domain_are_refused(make_script: MakeScript) -> None:
    with pytest.raises(InvalidInputError, match="the domain 'b', which no prompt has; the prompts' domains are: a"):
        make_script(some_prompts(2), replace(SETTINGS, samples=(("b", 2),)))
    with pytest.raises(InvalidInputError, match="'synthesised', which no prompt has"):
        make_script(some_prompts(2), replace(SETTINGS, samples=((SYNTHESISED, 2),)))


def test_a_capacity_without_room_is_refused(make_script: MakeScript) -> None:
    with pytest.raises(InvalidInputError, match="max_new_tokens is 16, expected less than the capacity of 16"):
        make_script(some_prompts(2), capacity=16)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"samples": (("a", -1),)}, "samples is .*, expected 0 or more"),
        ({"samples": (("a", 1), ("a", 2))}, "samples are given twice for the domain 'a'"),
        ({"samples": (("", 1), ("", 1))}, "samples are given twice for all other domains"),
        ({"greedy_share": 1.1}, "greedy_share is 1.1, expected between 0 and 1"),
        ({"greedy_share": float("nan")}, "greedy_share is nan"),
        ({"temperature": 0.0}, "temperature is 0.0, expected a number above 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"synthesise": -1}, "synthesise is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"wave": 0}, "wave is 0, expected at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidInputError, match=problem):
        ResponseSettings(**change)


def test_the_text_bundles_template_and_tokenizer(text_bundle_dir: Path) -> None:
    tokenizer, template = Tokenizer.load(text_bundle_dir), ChatTemplate.load(text_bundle_dir)
    assert tokenizer is not None
    script = Script(some_prompts(1), SETTINGS, tokenizer, template, 256, "m")
    assert text_of(jobs_of(script)[0]) == "u: say 0\na: "


OPENINGS = (
    PromptRecord(1, "code", turns=("def ",)),
    PromptRecord(2, "chat", messages=(Message("user", "hello"), Message("assistant", "hi"), Message("user", "so"))),
)


def test_the_target_goes_on_with_openings_in_turn(make_script: MakeScript) -> None:
    settings = replace(SETTINGS, synthesise=3, samples=(("", 1), ("code", 2)))
    script = make_script([], settings, openings=OPENINGS)
    jobs = jobs_of(script, lambda job: f"x{job.prompt}" if job.kind == "prompt" else "ok")
    begun = {job.prompt: text_of(job) for job in jobs if job.kind == "prompt"}
    assert begun == {0: "u: def ", 1: "u: hello\na: hi\nu: so", 2: "u: def "}
    answered = sorted((job.prompt, job.sample, job.domain, text_of(job)) for job in jobs if job.kind == "response")
    assert answered == [
        (0, 0, "code", "u: def x0\na: "),
        (0, 1, "code", "u: def x0\na: "),
        (1, 0, "chat", "u: hello\na: hi\nu: sox1\na: "),
        (2, 0, "code", "u: def x2\na: "),
        (2, 1, "code", "u: def x2\na: "),
    ]
    assert script.digest != make_script([], settings, openings=OPENINGS[:1]).digest
    # Behind a file's prompt, and with fewer prompts than openings.
    (only,) = make_script(some_prompts(1), replace(SETTINGS, synthesise=1), openings=OPENINGS)._to_synthesise
    assert text_of(only) == "u: hello\na: hi\nu: so"
    plain = replace(SETTINGS, synthesise=3)
    assert make_script([], plain, openings=OPENINGS).digest != make_script([], plain).digest


def test_the_target_makes_up_whole_conversations(make_script: MakeScript) -> None:
    settings = replace(SETTINGS, synthesise=4, synthesised_turns=3, samples=(("", 2),))
    cut = tuple(b"x" * 16)  # as long as may be: it has no end

    def say(job: Job) -> str | tuple[int, ...]:
        if job.kind == "response":
            return f"r{job.turn}{job.sample}"
        if job.prompt == 3 or (job.prompt == 2 and job.turn == 1 and job.sample == 1):
            return cut
        return f"q{job.prompt}{job.turn}{job.sample}"

    file = [PromptRecord(1, "chat", turns=("one", "two"))]
    script = make_script(file, settings)
    phases = asked(script, say)
    kinds = [sorted({(job.kind, job.turn) for wave in waves for job in wave}) for waves in phases]
    assert kinds == [
        [("prompt", 0)],
        [("response", 0)],
        [("prompt", 1), ("response", 1)],  # the file's second turn comes beside it
        [("response", 1)],
        [("prompt", 2)],
        [("response", 2)],
    ]
    last = {(job.prompt, job.sample): text_of(job) for wave in phases[-1] for job in wave}
    assert last[1, 0] == "u: q100\na: r00\nu: q110\na: r10\nu: q120\na: "
    assert last[1, 1] == "u: q100\na: r01\nu: q111\na: r11\nu: q121\na: "
    # A text without its end ends the conversation it stands in: prompt 2's at once, as it is the fourth of these.
    assert sorted(last) == [(1, 0), (1, 1), (2, 0), (4, 0), (4, 1)]
    own = [job.key for waves in phases for wave in waves for job in wave if job.prompt > 0]
    assert all(script.stands_on(key) for key in own if key[0] == "prompt")
    assert {key[2] for key in own if key[0] == "response" and script.stands_on(key)} == {0, 1}


@pytest.mark.parametrize(
    "opening",
    [
        PromptRecord(7, "a", token_ids=(1, 2)),
        PromptRecord(7, "a", turns=("one", "two")),
        PromptRecord(7, "a", messages=(Message("user", "one"), Message("assistant", "two"))),
    ],
)
def test_openings_that_no_user_can_go_on_with_are_refused(make_script: MakeScript, opening: PromptRecord) -> None:
    with pytest.raises(InvalidInputError, match="openings, line 7: expected a text, or messages"):
        make_script([], replace(SETTINGS, synthesise=1), openings=[opening])
