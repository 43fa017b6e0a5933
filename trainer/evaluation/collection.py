"""Running prompts and keeping what became of every round: the data of evaluation and calibration. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.runtime.chat_template import Message
from dspark_edge.runtime.generator import Generation, Generator, Prompt
from dspark_edge.runtime.prompts import PromptRecord
from dspark_edge.runtime.round import Round
from dspark_edge.runtime.sampling import SamplingParams
from dspark_edge.trainer.evaluation.metrics import Bools, Floats, Integers

__all__ = [
    "Judgement",
    "Recorder",
    "RoundSample",
    "RoundTable",
    "answer_turn",
    "check_prompts",
    "samples_of",
    "turn_prompt",
    "turn_seed",
]


@dataclass(frozen=True, slots=True)
class RoundSample:
    """What became of one round's draft. Positions behind a token that ended the answer are not counted at all."""

    position: int  # the anchor's
    verified: int  # draft positions that were judged
    accepted: int  # of these, accepted from the left
    committed: int  # tokens, the target's own included
    logits: tuple[float, ...] | None  # [verified] raw confidences; None without a confidence head
    confidences: tuple[float, ...] | None  # [verified] as the runtime calibrated them


@dataclass(slots=True)
class Recorder:
    """An observer that keeps the rounds of one answer."""

    rounds: list[Round] = field(default_factory=list)

    def __call__(self, record: Round) -> None:
        self.rounds.append(record)

    def take(self) -> list[Round]:
        """The rounds since the last call."""
        taken, self.rounds = self.rounds, []
        return taken


def turn_prompt(record: PromptRecord, turn: int, answers: Sequence[str]) -> Prompt:
    """What the model is given in a turn (from 0 on): the conversation so far, with its own answers in between."""
    if turn == 0:
        return record.opening
    messages = []
    for asked, answer in zip(record.turns[:turn], answers, strict=True):
        messages += [Message("user", asked), Message("assistant", answer)]
    return [*messages, Message("user", record.turns[turn])]


def turn_seed(seed: int, record: PromptRecord, turn: int) -> int:
    """A seed for one answer, which depends on no other prompt."""
    return int(np.random.SeedSequence([seed, record.line, turn]).generate_state(1)[0])


def check_prompts(generator: Generator, records: Sequence[PromptRecord]) -> None:
    """Refuse a file with prompts that cannot be run, before the first one is.

    Raises:
        InvalidInputError: names the line.
    """
    for record in records:
        try:
            size = len(generator.encode(record.opening))
            if record.num_turns > 1 and generator.chat_template is None:
                raise InvalidInputError("it has several turns, and the bundle no chat template to join them")
        except InvalidInputError as error:
            raise InvalidInputError(f"the prompt in line {record.line}: {error}") from None
        if not 0 < size <= generator.capacity:
            raise InvalidInputError(
                f"the prompt in line {record.line} has {size} tokens, expected 1 to the bundle's capacity of "
                f"{generator.capacity}; shorten it, or export with a larger --capacity"
            )


def answer_turn(
    generator: Generator, recorder: Recorder, prompt: Prompt, params: SamplingParams
) -> tuple[Generation, list[RoundSample]]:
    """Answer a prompt with the recorder's generator."""
    recorder.take()
    generation = generator.generate(prompt, params)
    return generation, samples_of(recorder.take(), generation)


def samples_of(rounds: Sequence[Round], generation: Generation) -> list[RoundSample]:
    """The samples in the rounds of an answer.

    An answer ends inside its last round in two ways. At the most tokens asked for, the text could have gone on: all
    that the round committed is counted, as it says as much of the drafter as any other. At a stop token nothing could
    follow: what stands behind it was drafted and judged for nothing, and is not counted.
    """
    samples = [_sample(record, record.accepted_length) for record in rounds]
    if rounds and generation.finish_reason == "stop":
        kept = len(generation.token_ids) - 1 - sum(record.accepted_length for record in rounds[:-1])
        samples[-1] = _sample(rounds[-1], kept)
    return samples


def _sample(record: Round, committed: int) -> RoundSample:
    whole = committed == record.accepted_length
    accepted = committed - 1 if whole else committed  # cut off, the target's own token is the first to go
    verified = record.verify_length if whole else committed
    logits, confidences = record.draft.confidence_logits, record.draft.confidences
    return RoundSample(
        position=record.position,
        verified=verified,
        accepted=accepted,
        committed=committed,
        logits=None if logits is None else logits[:verified],
        confidences=None if confidences is None else confidences[:verified],
    )


class Judgement(NamedTuple):
    """Confidences and what became of what they speak of; all [N]."""

    confidences: Floats
    outcomes: Bools
    prompts: Integers | None  # which prompt each is of

    @classmethod
    def joined(cls, parts: Sequence[Judgement]) -> Judgement:
        """All of several."""
        prompts = [part.prompts for part in parts if part.prompts is not None]
        return cls(
            np.concatenate([part.confidences for part in parts]),
            np.concatenate([part.outcomes for part in parts]),
            np.concatenate(prompts) if prompts else None,
        )


@dataclass(frozen=True, slots=True)
class RoundTable:
    """Rounds as columns; position k of a draft has the index k - 1."""

    position: npt.NDArray[np.int64]  # [N]
    verified: npt.NDArray[np.int64]  # [N]
    accepted: npt.NDArray[np.int64]  # [N]
    committed: npt.NDArray[np.int64]  # [N]
    logits: Floats | None  # [N, γ], 0 where nothing was verified
    confidences: Floats | None  # [N, γ], the same calibrated
    prompts: Integers | None = None  # [N] which prompt each is of; None: not known

    @classmethod
    def of(cls, samples: Sequence[RoundSample], block_size: int, prompts: Sequence[int] | None = None) -> RoundTable:
        """Rounds that were not drafted for count too; they have no confidences.

        Args:
            prompts: a number for each sample, equal for those of one prompt.
        """

        def column(name: str) -> npt.NDArray[np.int64]:
            return np.array([getattr(sample, name) for sample in samples], np.int64)

        def padded(name: str) -> Floats | None:
            rows = [getattr(sample, name) for sample in samples]
            if all(row is None for row in rows):
                return None
            table = np.zeros((len(rows), block_size))
            for index, row in enumerate(rows):
                table[index, : len(row or ())] = row or ()
            return table

        return cls(
            position=column("position"),
            verified=column("verified"),
            accepted=column("accepted"),
            committed=column("committed"),
            logits=padded("logits"),
            confidences=padded("confidences"),
            prompts=None if prompts is None else np.array(prompts, np.int64),
        )

    def __len__(self) -> int:
        return len(self.position)

    def judged(self, index: int) -> Bools:
        """Rounds in which the draft at an index was verified; [N]."""
        return self.verified > index

    def conditional(self, index: int) -> Bools:
        """Of these, those in which all drafts before it were accepted; [N]."""
        return self.judged(index) & (self.accepted >= index)

    def survived(self, index: int) -> Bools:
        """Rounds in which the draft at an index was accepted; [N]."""
        return self.accepted > index

    def prompts_of(self, rounds: Bools) -> Integers | None:
        """The prompts of chosen rounds."""
        return None if self.prompts is None else self.prompts[rounds]

    def judgement(self, chances: Floats, rounds: Bools, index: int) -> Judgement:
        """What chances [N, γ] say of the draft at an index in chosen rounds, and what became of it."""
        return Judgement(chances[rounds, index], self.survived(index)[rounds], self.prompts_of(rounds))
