"""What is asked of the target, in which order: a function of the prompts and the settings alone.

Requests are sorted by length and cut into waves, so that little of a wave is padding; then the waves are shuffled, so
that any part of the responses is like the whole. A conversation's later turns and the answers to synthesised prompts
come in later phases, when what they stand on is written.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.chat_template import ChatTemplate, Message
from dspark_edge.runtime.prompts import PromptRecord, hash_prompts
from dspark_edge.runtime.tokenizer import Tokenizer
from dspark_edge.trainer.responses.responders import Question

__all__ = ["SYNTHESISED", "Job", "JobKey", "ResponseSettings", "Script"]

JobKey = tuple[str, int, int, int]
"""Kind, prompt, turn and sample: each once in a plan."""

SYNTHESISED = "synthesised"
"""The domain of prompts that the target wrote itself."""

# Stands for what a user says. It has letters and marks, so that a template that changes case or escapes is found out.
_SENTINEL = "\ue000user <\"&'\\>\ue000"


@dataclass(frozen=True, slots=True)
class ResponseSettings:
    """How responses are drawn.

    Raises:
        InvalidInputError: a value is out of range.
    """

    max_new_tokens: int = 256
    samples: tuple[tuple[str, int], ...] = (("", 1),)  # (domain, responses to each of its prompts); "" is any other
    greedy_share: float = 0.5  # of the prompts get one greedy response among theirs
    temperature: float = 1.0  # of the responses that are not greedy
    synthesise: int = 0  # prompts that the target writes itself
    synthesised_turns: int = 1  # what it says as the user in each, with an answer after every turn
    seed: int = 0
    wave: int = 32  # sequences decoded together

    def __post_init__(self) -> None:
        checks = (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("samples", all(count >= 0 for _, count in self.samples), "0 or more"),
            ("greedy_share", 0 <= self.greedy_share <= 1, "between 0 and 1"),
            (
                "temperature",
                self.temperature > 0 and math.isfinite(self.temperature),
                "a number above 0 (for greedy responses set greedy_share)",
            ),
            ("synthesise", self.synthesise >= 0, "0 or more"),
            ("synthesised_turns", self.synthesised_turns >= 1, "at least 1"),
            ("seed", self.seed >= 0, "0 or more"),
            ("wave", self.wave >= 1, "at least 1"),
        )
        for name, valid, expected in checks:
            if not valid:
                raise InvalidInputError(f"{name} is {getattr(self, name)}, expected {expected}")
        domains = [domain for domain, _ in self.samples]
        for domain in domains:
            if domains.count(domain) > 1:
                what = f"for the domain {domain!r}" if domain else "for all other domains"
                raise InvalidInputError(f"samples are given twice {what}; give one number")

    def samples_of(self, domain: str) -> int:
        """Responses to each prompt of a domain."""
        counts = dict(self.samples)
        return counts.get(domain, counts.get("", 1))


@dataclass(frozen=True, slots=True)
class Job:
    """One request: a response to a turn of a prompt, or a prompt to be synthesised."""

    kind: str  # response | prompt
    prompt: int  # the prompt's number, from 0; synthesised ones follow those of the file
    turn: int
    sample: int
    domain: str
    question: Question

    @property
    def key(self) -> JobKey:
        return (self.kind, self.prompt, self.turn, self.sample)


class Script:
    """The phases of a run and their waves.

    Args:
        prompts: what users say.
        settings: how responses are drawn.
        tokenizer: the target's.
        template: its chat template; None takes texts as they are.
        capacity: most tokens of a request and its response; None: no limit.
        model: identifies the target, for the digest.
        vocab_size: the target's; None: token ids are not checked.
        openings: how synthesised prompts begin, in turn: their last words are the user's, and the target goes on with
            them. Domains are theirs. None: the target begins itself.

    Raises:
        InvalidInputError: a prompt cannot be asked (the message names its line), no prompt can be synthesised, the
            capacity is too small for any response, or samples are set for a domain that there is not.
    """

    def __init__(
        self,
        prompts: Sequence[PromptRecord],
        settings: ResponseSettings,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        capacity: int | None,
        model: str,
        vocab_size: int | None = None,
        openings: Sequence[PromptRecord] = (),
    ) -> None:
        self._prompts, self._settings = prompts, settings
        self._tokenizer, self._template = tokenizer, template
        self._capacity, self._vocab_size = capacity, vocab_size
        self.skipped = 0  # requests that do not fit the capacity
        said = [hash_prompts(list(prompts)), asdict(settings), capacity, model]
        said += [hash_prompts(list(openings))] if openings else []
        self.digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
        self._openings = [_Opening.of(record) for record in openings] if settings.synthesise else []
        self._openings = self._openings or [_Opening(SYNTHESISED, (), "")]
        self._check()
        # Made here, so that what is wrong with a prompt shows before any is answered.
        self._first_turn = list(self._turn(0, {}))
        self._to_synthesise = list(self._synthesise(0, {}, {})) if settings.synthesise else []

    def phases(self, answers: Mapping[JobKey, tuple[int, ...]]) -> Iterator[list[list[Job]]]:
        """Waves of each phase. `answers` holds, by job, what earlier phases got; it is read when a phase is reached."""
        self.skipped = 0
        if self._to_synthesise:
            yield self._waves(self._to_synthesise, 0)
        texts = self._synthesised(answers)
        own_turns = self._settings.synthesised_turns if texts else 0
        turns = max([1, *(record.num_turns for record in self._prompts)])
        for phase in range(1, max(turns, 2 * own_turns - 1) + 1):
            jobs = self._first_turn if phase == 1 else list(self._turn(phase - 1, answers))
            if phase // 2 < own_turns:
                # What the target says as the user, and what it answers, take turns.
                more = self._answer_synthesised if phase % 2 else self._synthesise
                jobs = [*jobs, *more(phase // 2, texts, answers)]
            yield self._waves(jobs, phase)

    def stands_on(self, key: JobKey) -> bool:
        """Whether a later phase needs the answer to this job."""
        kind, prompt, turn, _ = key
        own = prompt >= len(self._prompts)
        return kind == "prompt" or turn + 1 < (
            self._settings.synthesised_turns if own else self._prompts[prompt].num_turns
        )

    def _check(self) -> None:
        settings = self._settings
        if self._capacity is not None and settings.max_new_tokens >= self._capacity:
            raise InvalidInputError(
                f"max_new_tokens is {settings.max_new_tokens}, expected less than the capacity of {self._capacity} "
                "tokens, which a prompt and its response share"
            )
        known = {record.domain for record in self._prompts}
        known |= {opening.domain for opening in self._openings} if settings.synthesise else set()
        for domain, _ in settings.samples:
            if domain and domain not in known:
                raise InvalidInputError(
                    f"samples are set for the domain {domain!r}, which no prompt has; "
                    f"the prompts' domains are: {', '.join(sorted(known))}"
                )

    def _waves(self, jobs: list[Job], phase: int) -> list[list[Job]]:
        fitting = [job for job in jobs if self._fits(job)]
        self.skipped += len(jobs) - len(fitting)
        fitting.sort(key=lambda job: (len(job.question.token_ids), job.key))
        size = self._settings.wave
        waves = [fitting[start : start + size] for start in range(0, len(fitting), size)]
        order = np.random.default_rng((self._settings.seed, phase)).permutation(len(waves))
        return [waves[index] for index in order]

    def _fits(self, job: Job) -> bool:
        needed = len(job.question.token_ids) + job.question.max_new_tokens
        return self._capacity is None or needed <= self._capacity

    def _job(self, kind: str, prompt: int, turn: int, sample: int, domain: str, token_ids: list[int]) -> Job:
        seed, share, chosen = self._settings.seed, self._settings.greedy_share, 0.0
        state = np.random.SeedSequence((seed, int(kind == "prompt"), prompt, turn, sample)).generate_state(2)
        if kind == "response" and sample == 0:
            # By the prompt, not by the turn: a conversation is greedy or sampled as a whole.
            chosen = np.random.default_rng((seed, prompt)).random()
        greedy = kind == "response" and sample == 0 and chosen < share
        temperature = 0.0 if greedy else self._settings.temperature
        question = Question(tuple(token_ids), self._settings.max_new_tokens, temperature, int(state[0]))
        return Job(kind, prompt, turn, sample, domain, question)

    def _turn(self, turn: int, answers: Mapping[JobKey, tuple[int, ...]]) -> Iterator[Job]:
        """Jobs of a turn of the file's prompts."""
        for number, record in enumerate(self._prompts):
            count = self._settings.samples_of(record.domain)
            if turn >= record.num_turns:
                continue
            for sample in range(count):
                try:
                    token_ids = self._request(record, number, turn, sample, answers)
                except InvalidInputError as error:
                    raise InvalidInputError(f"prompts, line {record.line}: {error}") from None
                if token_ids is not None:
                    yield self._job("response", number, turn, sample, record.domain, token_ids)

    def _request(
        self,
        record: PromptRecord,
        number: int,
        turn: int,
        sample: int,
        answers: Mapping[JobKey, tuple[int, ...]],
    ) -> list[int] | None:
        """Token ids before a turn's response; None where an earlier turn got none."""
        if record.token_ids:
            for token in record.token_ids:
                if self._vocab_size is not None and token >= self._vocab_size:
                    raise InvalidInputError(
                        f"token id {token} is outside the target's vocabulary of {self._vocab_size} tokens"
                    )
            return list(record.token_ids)
        if record.messages:
            return self._encode(list(record.messages))
        messages = []
        for earlier in range(turn):
            answer = answers.get(("response", number, earlier, sample))
            if answer is None:
                return None
            messages.append(Message("user", record.turns[earlier]))
            messages.append(Message("assistant", self._tokenizer.decode(answer).strip()))
        messages.append(Message("user", record.turns[turn]))
        return self._encode(messages)

    def _encode(self, messages: list[Message]) -> list[int]:
        if self._template is not None:
            token_ids = self._tokenizer.encode(self._template.render(messages), add_special_tokens=False)
        elif len(messages) > 1:
            raise InvalidInputError("the target has no chat template; conversations of several messages need one")
        else:
            token_ids = self._tokenizer.encode(messages[0].content, add_special_tokens=True)
        if not token_ids:
            raise InvalidInputError("the prompt is empty; give at least one token")
        return token_ids

    def _synthesise(
        self, turn: int, texts: Mapping[int, str], answers: Mapping[JobKey, tuple[int, ...]]
    ) -> Iterator[Job]:
        """Jobs of what the target says as the user in a turn: the template up to there, and how it shall begin."""
        numbers = range(len(self._prompts), len(self._prompts) + self._settings.synthesise)
        used = {prompt % len(self._openings) for prompt in numbers} if turn == 0 else ()
        begun = {
            place: self._encode_opening(self._openings[place].earlier, self._openings[place].text) for place in used
        }
        for prompt in numbers:
            domain = self._opening(prompt).domain
            if turn == 0:
                yield self._job("prompt", prompt, 0, 0, domain, begun[prompt % len(self._openings)])
                continue
            for sample in range(self._settings.samples_of(domain)):
                messages = self._conversation(prompt, turn, sample, texts, answers)
                if messages is not None:
                    token_ids = self._encode_opening(messages, "")
                    yield self._job("prompt", prompt, turn, sample, domain, token_ids)

    def _opening(self, prompt: int) -> _Opening:
        return self._openings[prompt % len(self._openings)]

    def _encode_opening(self, messages: Sequence[Message], text: str) -> list[int]:
        """Token ids up to where the user goes on."""
        if self._template is None:
            raise InvalidInputError("prompts cannot be synthesised: the target has no chat template")
        rendered = self._template.render([*messages, Message("user", text + _SENTINEL)])
        opening, found, _ = rendered.partition(_SENTINEL)
        if not found:
            raise InvalidInputError("prompts cannot be synthesised: the chat template changes what the user says")
        token_ids = self._tokenizer.encode(opening, add_special_tokens=False)
        if not token_ids:
            raise InvalidInputError("prompts cannot be synthesised: the chat template begins with what the user says")
        fits = self._capacity is None or len(token_ids) + self._settings.max_new_tokens <= self._capacity
        if not messages and not fits:
            raise InvalidInputError(
                f"prompts cannot be synthesised: {len(token_ids)} tokens of the chat template and max_new_tokens, "
                f"{self._settings.max_new_tokens}, pass the capacity of {self._capacity} tokens"
            )
        return token_ids

    def _synthesised(self, answers: Mapping[JobKey, tuple[int, ...]]) -> dict[int, str]:
        """Usable first texts by prompt number: whole, not empty, each once."""
        texts: dict[int, str] = {}
        seen: set[str] = set()
        for (kind, prompt, turn, _), answer in sorted(answers.items()):
            if kind == "prompt" and turn == 0 and len(answer) < self._settings.max_new_tokens:  # a cut text has no end
                text = (self._opening(prompt).text + self._tokenizer.decode(answer)).strip()
                if text and text not in seen:
                    seen.add(text)
                    texts[prompt] = text
        return texts

    def _answer_synthesised(
        self, turn: int, texts: Mapping[int, str], answers: Mapping[JobKey, tuple[int, ...]]
    ) -> Iterator[Job]:
        """Jobs of the answers to what the target said as the user in a turn."""
        for prompt in texts:
            domain = self._opening(prompt).domain
            for sample in range(self._settings.samples_of(domain)):
                messages = self._conversation(prompt, turn, sample, texts, answers)
                text = self._said(prompt, turn, sample, texts, answers)
                if messages is not None and text:
                    token_ids = self._encode([*messages, Message("user", text)])
                    yield self._job("response", prompt, turn, sample, domain, token_ids)

    def _said(
        self,
        prompt: int,
        turn: int,
        sample: int,
        texts: Mapping[int, str],
        answers: Mapping[JobKey, tuple[int, ...]],
    ) -> str:
        """What the target said as the user in a turn; empty where that has no end."""
        if turn == 0:
            return texts[prompt]
        said = answers.get(("prompt", prompt, turn, sample), ())
        return self._tokenizer.decode(said).strip() if len(said) < self._settings.max_new_tokens else ""

    def _conversation(
        self,
        prompt: int,
        turns: int,
        sample: int,
        texts: Mapping[int, str],
        answers: Mapping[JobKey, tuple[int, ...]],
    ) -> list[Message] | None:
        """The first turns of a prompt that the target made up, with its answers; None where it stopped earlier."""
        if prompt not in texts:
            return None
        messages = [*self._opening(prompt).earlier]
        for turn in range(turns):
            text = self._said(prompt, turn, sample, texts, answers)
            answer = answers.get(("response", prompt, turn, sample))
            if answer is None or not text:
                return None
            messages += [Message("user", text), Message("assistant", self._tokenizer.decode(answer).strip())]
        return messages


@dataclass(frozen=True, slots=True)
class _Opening:
    """How a synthesised prompt begins."""

    domain: str
    earlier: tuple[Message, ...]
    text: str  # the user's, to be gone on with

    @classmethod
    def of(cls, record: PromptRecord) -> _Opening:
        messages = record.messages or tuple(Message("user", text) for text in record.turns[:1])
        if record.token_ids or record.num_turns > 1 or messages[-1].role != "user":
            raise InvalidInputError(
                f"openings, line {record.line}: expected a text, or messages of which the user's comes last"
            )
        return cls(record.domain, messages[:-1], messages[-1].content)
