"""The generation API: a bundle and a prompt in, text or tokens out.

with Generator.open("bundle/") as generator:
    for piece in generator.stream("Write a haiku", SamplingParams(max_new_tokens=64)):
        print(piece.text, end="")
"""

from __future__ import annotations

import collections.abc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Engine
from dspark_edge.engines.errors import CapacityError, InvalidInputError
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.chat_template import ChatTemplate, Message
from dspark_edge.runtime.detokenizer import IncrementalDetokenizer
from dspark_edge.runtime.model import ModelDrafter, ModelVerifier
from dspark_edge.runtime.ngram import NgramDrafter
from dspark_edge.runtime.round import Drafter, Observer, Policy, Request, decode_round, static_policy
from dspark_edge.runtime.sampling import RandomStream, SamplingParams
from dspark_edge.runtime.sequence import Sequence
from dspark_edge.runtime.statistics import Statistics, Tally
from dspark_edge.runtime.tokenizer import Tokenizer

__all__ = ["MODES", "Generation", "Generator", "GeneratorOptions", "Piece", "Prompt"]

MODES = ("plain", "static")
"""plain: the target alone; static: always verify a block of the same length."""

Prompt = str | collections.abc.Sequence[int] | collections.abc.Sequence[Message]
"""Text, token ids, or the messages of a conversation."""


@dataclass(frozen=True, slots=True)
class GeneratorOptions:
    """How a generator decodes.

    Raises:
        InvalidInputError: an option is unknown or out of range.
    """

    mode: str = "static"
    verify_length: int | None = None  # draft tokens verified a round in static mode; None: the whole block
    prefill_chunk: int = 256  # most prompt tokens a call

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise InvalidInputError(f"unknown mode {self.mode!r}; choose one of: {', '.join(MODES)}")
        if self.verify_length is not None and self.verify_length < 1:
            raise InvalidInputError(f"verify_length is {self.verify_length}, expected at least 1 (or --mode plain)")
        if self.prefill_chunk < 1:
            raise InvalidInputError(f"prefill_chunk is {self.prefill_chunk}, expected at least 1")


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer."""

    token_ids: tuple[int, ...]  # new ids only; the end-of-text id that ended it included
    text: str  # without special tokens and without the stop text
    finish_reason: str  # stop | length | cancelled
    log_probs: tuple[float, ...]  # of token_ids, under the target, before temperature and filters
    statistics: Statistics

    def to_json(self) -> dict[str, Any]:
        return {
            "token_ids": list(self.token_ids),
            "text": self.text,
            "finish_reason": self.finish_reason,
            "stats": self.statistics.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Piece:
    """What one round added to a stream."""

    text: str  # may be empty: half a character, or the possible beginning of a stop text, is held back
    token_ids: tuple[int, ...]
    generation: Generation | None = None  # the whole answer, with the last piece only


class Generator:
    """Decodes one prompt after another. A context manager; not for several threads at once, but for `cancel`.

    The caches are kept between calls: a prompt that begins like the one before, as the second turn of a conversation
    does, is prefilled from where it differs.

    Args:
        engine: executes the bundle's graphs; closed with the generator.
        options: see `GeneratorOptions`.
        make_drafter: makes another drafter than the bundle's own, on the engine; the mode still decides its use.
        observer: is shown every round.
        calibration: of the drafter's confidences, instead of the bundle's own.

    Raises:
        BundleError: the bundle's tokenizer, chat template or calibration is damaged.
        InvalidInputError: an option does not fit the bundle.
    """

    def __init__(
        self,
        engine: Engine,
        options: GeneratorOptions | None = None,
        make_drafter: Callable[[Engine], Drafter] | None = None,
        observer: Observer | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self._engine = engine
        self.options = options or GeneratorOptions()
        self.bundle = engine.bundle
        manifest = self.bundle.manifest
        self._vocabulary = manifest.target.vocab_size
        self._eos_ids = frozenset(manifest.target.eos_token_ids)
        self.tokenizer = Tokenizer.load(self.bundle.path)
        self.chat_template = ChatTemplate.load(self.bundle.path) if self.tokenizer else None
        self._verifier = ModelVerifier(engine, self.options.prefill_chunk)
        self._drafter, self._policy = self._plan(make_drafter, calibration)
        self._observer = observer
        self._sequence: Sequence | None = None  # what the caches hold
        self._cancelled = threading.Event()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        mode: str = "static",
        verify_length: int | None = None,
        prefill_chunk: int = 256,
        provider: str = "cpu",
        threads: int | None = None,
    ) -> Generator:
        """Open a bundle and run it with ONNX Runtime.

        Args:
            path: the bundle's folder.
            mode, verify_length, prefill_chunk: see `GeneratorOptions`.
            provider: "cpu", "cuda", or an ONNX Runtime provider's full name.
            threads: threads on the CPU; None: all cores.

        Raises:
            BundleError, EngineError, InvalidInputError: see there.
        """
        from dspark_edge.engines.onnxruntime_engine import OnnxRuntimeEngine

        options = GeneratorOptions(mode, verify_length, prefill_chunk)
        engine = OnnxRuntimeEngine(Bundle.open(path), provider, threads)
        try:
            return cls(engine, options)
        except BaseException:
            engine.close()
            raise

    @property
    def capacity(self) -> int:
        """Most tokens of a prompt and its answer together."""
        return self._verifier.capacity

    def close(self) -> None:
        """Release the engine. May be called twice."""
        self._sequence = None
        self._engine.close()

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def cancel(self) -> None:
        """End the running generation after its current round; from any thread."""
        self._cancelled.set()

    def reset(self) -> None:
        """Forget what the caches hold, so that the next prompt is prefilled from its first token."""
        self._sequence = None

    def encode(self, prompt: Prompt, *, raw: bool = False) -> list[int]:
        """A prompt's token ids.

        Args:
            prompt: text, messages or ids.
            raw: feed a text as it is, without the chat template.

        Raises:
            InvalidInputError: the bundle has no tokenizer or chat template for it, or an id is out of range.
        """
        if not isinstance(prompt, str) and all(isinstance(part, Message) for part in prompt) and len(prompt):
            return self._encode_messages([part for part in prompt if isinstance(part, Message)])
        if isinstance(prompt, str):
            if self.chat_template is not None and not raw:
                return self._encode_messages([Message("user", prompt)])
            return self._tokenizer("a text prompt").encode(prompt, add_special_tokens=True)
        token_ids: list[int] = []
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self._vocabulary:
                raise InvalidInputError(f"token id {token!r} is outside the vocabulary of {self._vocabulary} tokens")
            token_ids.append(token)
        return token_ids

    def generate(self, prompt: Prompt, params: SamplingParams | None = None, *, raw: bool = False) -> Generation:
        """The whole answer to a prompt; see `stream`."""
        for piece in self.stream(prompt, params, raw=raw):
            if piece.generation is not None:
                return piece.generation
        raise RuntimeError("a stream ended without its generation")

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, *, raw: bool = False) -> Iterator[Piece]:
        """Answer a prompt piece by piece, a piece a round. Closing the iterator cancels.

        Raises:
            InvalidInputError: the prompt is empty or does not fit the bundle (CapacityError: the capacity).
            EngineError: the backend failed.
        """
        params = params or SamplingParams()
        token_ids = self.encode(prompt, raw=raw)
        if not token_ids:
            raise InvalidInputError("the prompt is empty; give at least one token")
        if len(token_ids) > self.capacity:
            raise CapacityError(
                f"the prompt has {len(token_ids)} tokens, the bundle's capacity is {self.capacity}; "
                "shorten it, or export with a larger --capacity"
            )
        if params.stop:
            self._tokenizer("a stop text")
        self._cancelled.clear()
        return self._decode(token_ids, params)

    def _plan(
        self, make_drafter: Callable[[Engine], Drafter] | None, calibration: Calibration | None
    ) -> tuple[Drafter | None, Policy]:
        """Drafter and policy of the options' mode."""
        facts = self.bundle.manifest.drafter
        if self.options.mode == "plain":
            return None, static_policy(0)
        drafter: Drafter
        if make_drafter is not None:
            drafter = make_drafter(self._engine)
        elif facts.kind == "ngram":
            drafter = NgramDrafter(self._engine, facts.block_size)
        else:
            calibration = calibration or Calibration.load(self.bundle)
            drafter = ModelDrafter(self._engine, self._verifier.caches, calibration)
        length = self.options.verify_length or drafter.block_size
        if length > drafter.block_size:
            raise InvalidInputError(f"verify_length is {length}, the drafter's block has {drafter.block_size} tokens")
        return drafter, static_policy(length)

    def _tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidInputError(f"the bundle has no tokenizer, which {what} needs; give token ids")
        return self.tokenizer

    def _encode_messages(self, messages: list[Message]) -> list[int]:
        tokenizer = self._tokenizer("a conversation")
        if self.chat_template is None:
            raise InvalidInputError("the bundle has no chat template; give a text (raw) or token ids")
        # The template writes the special tokens itself.
        return tokenizer.encode(self.chat_template.render(messages), add_special_tokens=False)

    def _reuse(self, token_ids: list[int]) -> int:
        """Leading tokens that the caches hold already; at least one is left to run, for its logits."""
        if self._sequence is None:
            return 0
        known = self._sequence.token_ids[: self._sequence.cache_length]
        shared = 0
        for cached, wanted in zip(known, token_ids[:-1], strict=False):
            if cached != wanted:
                break
            shared += 1
        return shared

    def _decode(self, token_ids: list[int], params: SamplingParams) -> Iterator[Piece]:
        started = perf_counter()
        reused = self._reuse(token_ids)
        sequence = Sequence(list(token_ids), len(token_ids), reused)
        request = Request(sequence, params, RandomStream(params.seed))
        tally = Tally(len(token_ids), reused)
        answer = _Answer(sequence, params, self._eos_ids, self.capacity, self.tokenizer)
        self._sequence = None  # until a call has ended well, the caches are nobody's
        verdict = self._verifier.prefill(request)
        sequence.commit((verdict.next_id,), verdict.log_probs)
        self._sequence = sequence
        text = answer.take_in()
        tally.time_to_first_token_s = perf_counter() - started
        while True:
            if answer.finish_reason is None and self._cancelled.is_set():
                answer.finish_reason = "cancelled"
            if answer.finish_reason is not None:
                text += answer.finish_text()
                generation = answer.result(tally)
                yield Piece(text, answer.last_ids, generation)
                return
            yield Piece(text, answer.last_ids)
            if self._sequence is not sequence:
                raise InvalidInputError(
                    "another generation was started, or the generator closed; this one cannot go on"
                )
            round_started = perf_counter()
            self._sequence = None
            record = decode_round(request, self._verifier, self._drafter, self._policy)
            self._sequence = sequence
            text = answer.take_in()
            tally.add(record)
            tally.decode_s += perf_counter() - round_started
            if self._observer is not None:
                self._observer(record)


class _Answer:
    """Cuts what rounds commit at the request's end, and turns it into text."""

    def __init__(
        self,
        sequence: Sequence,
        params: SamplingParams,
        eos_ids: frozenset[int],
        capacity: int,
        tokenizer: Tokenizer | None,
    ) -> None:
        self._sequence = sequence
        self._stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
        limit = capacity + 1 - sequence.prompt_length  # the last token needs no slot
        self._limit = limit if params.max_new_tokens is None else min(params.max_new_tokens, limit)
        self._detokenizer = IncrementalDetokenizer(tokenizer, params.stop) if tokenizer is not None else None
        self._taken = 0
        self._text = ""
        self.last_ids: tuple[int, ...] = ()
        self.finish_reason: str | None = None

    def take_in(self) -> str:
        """Judge the tokens committed since the last call; drop those behind the end. Returns the new text."""
        sequence = self._sequence
        fresh = sequence.new_ids[self._taken :]
        keep = min(len(fresh), self._limit - self._taken)
        for count, token in enumerate(fresh[:keep], start=1):
            if token in self._stop_ids:
                keep, self.finish_reason = count, "stop"
                break
        text = ""
        if self._detokenizer is not None:
            text = self._detokenizer.push(fresh[:keep])
            if self._detokenizer.stopped and self._detokenizer.stop_token_count is not None:
                keep, self.finish_reason = self._detokenizer.stop_token_count - self._taken, "stop"
        self._taken += keep
        if self.finish_reason is None and self._taken >= self._limit:
            self.finish_reason = "length"
        sequence.rollback_to(sequence.prompt_length + self._taken)
        self.last_ids = tuple(fresh[:keep])
        self._text += text
        return text

    def finish_text(self) -> str:
        """Text that was held back and is certain now."""
        rest = self._detokenizer.finish() if self._detokenizer is not None else ""
        self._text += rest
        return rest

    def result(self, tally: Tally) -> Generation:
        new_ids = tuple(self._sequence.new_ids)
        return Generation(
            new_ids,
            self._text,
            self.finish_reason or "stop",
            tuple(self._sequence.log_probs),
            tally.result(len(new_ids)),
        )
