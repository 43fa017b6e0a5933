"""Running a bundle over prompts, plain and speculative by turns, and keeping all that happened. No torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dspark_edge.engines.engine import Engine
from dspark_edge.engines.errors import CapacityError
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.generator import Generation, Generator, GeneratorOptions, Prompt
from dspark_edge.runtime.prompts import PromptRecord
from dspark_edge.runtime.sampling import SamplingParams
from dspark_edge.trainer.evaluation.collection import (
    Recorder,
    RoundSample,
    answer_turn,
    check_prompts,
    turn_prompt,
    turn_seed,
)

__all__ = ["Difference", "Evaluation", "EvaluationOptions", "TurnResult", "evaluate"]

_WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """How prompts are answered.

    Raises:
        InvalidInputError: a value is out of range.
    """

    temperature: float = 0.0
    seed: int = 0
    max_new_tokens: int = 128
    verify_length: int | None = None  # None: the whole block
    plain: bool = True  # whether the target alone answers too

    def __post_init__(self) -> None:
        self.sampling(self.seed)

    def sampling(self, seed: int) -> SamplingParams:
        return SamplingParams(max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=seed)


@dataclass(frozen=True, slots=True)
class Difference:
    """Where the plain and the speculative answer part; None for the one that had ended."""

    line: int  # of the prompts file
    domain: str
    turn: int  # from 1 on
    index: int  # of the first token that differs
    plain_token: int | None
    static_token: int | None
    plain_log_prob: float | None  # under the target: two that are nearly equal tell of a near tie
    static_log_prob: float | None


@dataclass(frozen=True, slots=True)
class TurnResult:
    """One answer, and the plain one to the same prompt."""

    record: PromptRecord
    turn: int  # from 0 on
    static: Generation
    plain: Generation | None
    samples: tuple[RoundSample, ...]

    @property
    def difference(self) -> Difference | None:
        """Where the two answers part; None where they are the same, or there is one only."""
        if self.plain is None or self.plain.token_ids == self.static.token_ids:
            return None
        plain, static = self.plain.token_ids, self.static.token_ids
        shorter = min(len(plain), len(static))
        index = next((i for i in range(shorter) if plain[i] != static[i]), shorter)
        both = (
            (answer.token_ids[index], answer.log_probs[index]) if index < len(answer.token_ids) else (None, None)
            for answer in (self.plain, self.static)
        )
        (plain_token, plain_log_prob), (static_token, static_log_prob) = both
        return Difference(
            self.record.line,
            self.record.domain,
            self.turn + 1,
            index,
            plain_token,
            static_token,
            plain_log_prob,
            static_log_prob,
        )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All answers of an evaluation, in the order of the prompts."""

    results: tuple[TurnResult, ...]
    block_size: int
    calibration: Calibration | None  # the bundle's
    skipped_turns: int  # later turns that did not fit the capacity

    @property
    def differences(self) -> list[Difference]:
        """Answers that differ. At temperature 0 there should be none; above, the modes draw differently."""
        return [difference for result in self.results if (difference := result.difference) is not None]


def evaluate(
    engine: Engine,
    records: Sequence[PromptRecord],
    options: EvaluationOptions,
    report: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Answer prompts turn by turn, each in plain and in static mode on one engine.

    The modes share the engine's weights and have caches of their own. They take turns, and the first to go changes
    from turn to turn, so that a machine that slows down slows both. A later turn continues from the speculative
    answers, in both modes. Every prompt starts from empty caches.

    Args:
        engine: with the bundle; stays open.
        records: the prompts.
        options: see there.
        report: called with (prompts done, prompts in all).

    Raises:
        InvalidInputError: a prompt cannot be run (before any is), or an option does not fit the bundle.
        BundleError: the bundle's tokenizer, template or calibration is damaged.
        EngineError: the backend failed.
    """
    manifest = engine.bundle.manifest
    # ngram and drafters without a confidence head have nothing to calibrate.
    calibration = Calibration.load(engine.bundle) if manifest.drafter.confidence else None
    pair = _Pair(engine, options, calibration)
    check_prompts(pair.static, records)
    pair.warm_up(records[0].opening)
    results: list[TurnResult] = []
    skipped = 0
    for done, record in enumerate(records):
        pair.reset()
        answers: list[str] = []
        for turn in range(record.num_turns):
            try:
                result = pair.answer(record, turn, answers, plain_first=len(results) % 2 == 0)
            except CapacityError:  # of a later turn: the first ones were checked
                skipped += record.num_turns - turn
                break
            answers.append(result.static.text)
            results.append(result)
        if report is not None:
            report(done + 1, len(records))
    return Evaluation(tuple(results), manifest.drafter.block_size, calibration, skipped)


class _Pair:
    """A speculative and, unless it is not wanted, a plain generator on one engine."""

    def __init__(self, engine: Engine, options: EvaluationOptions, calibration: Calibration | None) -> None:
        self._options = options
        self._recorder = Recorder()
        mode = GeneratorOptions("static", options.verify_length)
        self.static = Generator(engine, mode, observer=self._recorder, calibration=calibration)
        self.plain = Generator(engine, GeneratorOptions("plain")) if options.plain else None

    def reset(self) -> None:
        for generator in (self.static, self.plain):
            if generator is not None:
                generator.reset()

    def warm_up(self, prompt: Prompt) -> None:
        """Load and bind all graphs, so that this does not count as the first prompt's time."""
        params = SamplingParams(max_new_tokens=_WARM_UP_TOKENS, temperature=self._options.temperature, seed=0)
        for generator in (self.static, self.plain):
            if generator is not None:
                generator.generate(prompt, params)

    def answer(self, record: PromptRecord, turn: int, answers: Sequence[str], plain_first: bool) -> TurnResult:
        prompt = turn_prompt(record, turn, answers)
        params = self._options.sampling(turn_seed(self._options.seed, record, turn))
        plain = self.plain.generate(prompt, params) if self.plain is not None and plain_first else None
        static, samples = answer_turn(self.static, self._recorder, prompt, params)
        if self.plain is not None and plain is None:
            plain = self.plain.generate(prompt, params)
        return TurnResult(record, turn, static, plain, tuple(samples))
