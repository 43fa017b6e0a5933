"""The generation API: a bundle and a prompt in, text or tokens out.

with Generator.open("bundle/") as generator:
    for piece in generator.stream("Write a haiku", SamplingParams(max_new_tokens=64)):
        print(piece.text, end="")
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from types import TracebackType

from dspark_edge.engines.bundle import Bundle
from dspark_edge.engines.engine import Engine
from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.engines.opening import EngineChoice
from dspark_edge.runtime.answer import Answer, Generation
from dspark_edge.runtime.bit_exact import chunk_of, exact_width, whole_chunks
from dspark_edge.runtime.calibration import Calibration
from dspark_edge.runtime.chat_template import ChatTemplate
from dspark_edge.runtime.encoding import Prompt, PromptEncoder
from dspark_edge.runtime.model import ModelDrafter, ModelVerifier
from dspark_edge.runtime.ngram import NgramDrafter
from dspark_edge.runtime.round import Drafter, FixedLength, Observer, Policy, Request, decode_round
from dspark_edge.runtime.sampling import RandomStream, SamplingParams
from dspark_edge.runtime.scheduled_policy import StreamScheduling
from dspark_edge.runtime.sequence import Sequence
from dspark_edge.runtime.statistics import EngineStatistics, EngineTally, Tally
from dspark_edge.runtime.tokenizer import Tokenizer

__all__ = ["MODES", "Generation", "Generator", "GeneratorOptions", "Piece", "Prompt"]

MODES = ("plain", "static", "scheduled")
"""plain: the target alone; static: always verify a block of the same length; scheduled: draft and verify what pays on
this device."""

_PREFILL_CHUNK = 256


@dataclass(frozen=True, slots=True)
class GeneratorOptions:
    """How a generator decodes.

    Raises:
        InvalidInputError: an option is unknown or out of range.
    """

    mode: str | None = None  # None: scheduled where the device has been profiled, static elsewhere
    verify_length: int | None = None  # draft tokens verified a round in static mode; None: the whole block
    prefill_chunk: int | None = None  # most prompt tokens a call; None: 256, or what bit_exact fixes
    bit_exact: bool = False  # answers do not depend on how they were decoded, to the last bit; see docs/bit-exact.md

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise InvalidInputError(f"unknown mode {self.mode!r}; choose one of: {', '.join(MODES)}")
        if self.verify_length is not None and self.verify_length < 1:
            raise InvalidInputError(f"verify_length is {self.verify_length}, expected at least 1 (or --mode plain)")
        if self.verify_length is not None and self.mode == "scheduled":
            raise InvalidInputError("verify_length fixes what mode 'scheduled' decides; give one of the two")
        chunk_of(self.prefill_chunk, _PREFILL_CHUNK, self.bit_exact)

    @property
    def chunk(self) -> int:
        """Most prompt tokens a call."""
        return chunk_of(self.prefill_chunk, _PREFILL_CHUNK, self.bit_exact)


@dataclass(frozen=True, slots=True)
class Piece:
    """What one round added to a stream."""

    text: str  # may be empty: half a character, or the possible beginning of a stop text, is held back
    token_ids: tuple[int, ...]
    generation: Generation | None = None  # the whole answer, with the last piece only


class Generator:
    """Decodes one prompt after another. A context manager; not for several threads at once, but for `cancel`.

    The caches are kept between calls: a prompt that begins like the one before, as the second turn of a conversation
    does, is prefilled from where it differs. In bit-exact mode only what was prefilled is reused, in whole chunks: an
    answer's tokens were cached by calls of another width.

    Args:
        engine: executes the bundle's graphs; closed with the generator.
        options: see `GeneratorOptions`.
        make_drafter: makes another drafter than the bundle's own, on the engine; the mode still decides its use.
        observer: is shown every round.
        calibration: of the drafter's confidences, instead of the bundle's own.
        scheduling: decides for the mode 'scheduled'; knows costs and what became of earlier requests.

    Raises:
        BundleError: the bundle's tokenizer, chat template or calibration is damaged.
        EngineError: the target cannot be loaded, or the backend cannot keep bit_exact.
        InvalidInputError: an option does not fit the bundle or the scheduling, the mode is 'scheduled' without one, or
            bit_exact is on and the drafter's blocks are longer than the bundle's.
    """

    def __init__(
        self,
        engine: Engine,
        options: GeneratorOptions | None = None,
        make_drafter: Callable[[Engine], Drafter] | None = None,
        observer: Observer | None = None,
        calibration: Calibration | None = None,
        scheduling: StreamScheduling | None = None,
    ) -> None:
        self._engine = engine
        self.options = options or GeneratorOptions()
        self.bundle = engine.bundle
        self._encoder = PromptEncoder.of(self.bundle)
        width = exact_width(self.bundle.manifest) if self.options.bit_exact else None
        self._verifier = ModelVerifier(engine, self.options.chunk, width)
        self._length = 0  # verified a round where nothing is scheduled
        self._drafter, self._scheduling = self._plan(make_drafter, calibration, scheduling)
        self._observer = observer
        self._sequence: Sequence | None = None  # what the caches hold
        self._cancelled = threading.Event()
        self._totals = EngineTally()

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        mode: str | None = None,
        verify_length: int | None = None,
        prefill_chunk: int | None = None,
        bit_exact: bool = False,
        engine: str = "onnxruntime",
        provider: str | None = None,
        threads: int | None = None,
    ) -> Generator:
        """Open a bundle and run it.

        Args:
            path: the bundle's folder.
            mode, verify_length, prefill_chunk, bit_exact: see `GeneratorOptions`.
            engine, provider, threads: see `EngineChoice`.

        Raises:
            BundleError, EngineError, InvalidInputError: see there; InvalidInputError also where mode is "scheduled"
                and the bundle has no valid profile of this device.
        """
        options = GeneratorOptions(mode, verify_length, prefill_chunk, bit_exact)
        choice = EngineChoice(engine, provider, threads)
        opened = choice.open(Bundle.open(path))
        try:
            scheduling = None
            if mode in (None, "scheduled") and verify_length is None:
                width = exact_width(opened.bundle.manifest) if bit_exact else None
                scheduling = StreamScheduling.of_device(
                    opened.bundle, choice.device(), needed=mode is not None, width=width
                )
            return cls(opened, options, scheduling=scheduling)
        except BaseException:
            opened.close()
            raise

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The bundle's; None where it has none."""
        return self._encoder.tokenizer

    @property
    def chat_template(self) -> ChatTemplate | None:
        """The bundle's; None where it has none, or no tokenizer."""
        return self._encoder.chat_template

    @property
    def capacity(self) -> int:
        """Most tokens of a prompt and its answer together; in bit-exact mode γ fewer than the bundle's."""
        return self._verifier.capacity

    @property
    def statistics(self) -> EngineStatistics:
        """Of all answers so far together, a running one included."""
        return self._totals.result()

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
        return self._encoder.encode(prompt, raw=raw)

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
        token_ids = self._encoder.checked(prompt, params, self.capacity, raw=raw)
        self._cancelled.clear()
        return self._decode(token_ids, params)

    def _plan(
        self,
        make_drafter: Callable[[Engine], Drafter] | None,
        calibration: Calibration | None,
        scheduling: StreamScheduling | None,
    ) -> tuple[Drafter | None, StreamScheduling | None]:
        """The drafter of the options' mode, and what schedules it; settles the mode."""
        facts, mode = self.bundle.manifest.drafter, self.options.mode
        if mode is None:
            mode = "static" if scheduling is None else "scheduled"
        self.options = replace(self.options, mode=mode)
        if mode == "plain":
            return None, None
        drafter: Drafter
        if make_drafter is not None:
            drafter = make_drafter(self._engine)
        elif facts.kind == "ngram":
            drafter = NgramDrafter(self._engine, facts.block_size)
        else:
            calibration = calibration or Calibration.load(self.bundle)
            drafter = ModelDrafter(self._engine, self._verifier.caches, calibration)
        if self.options.bit_exact and drafter.block_size > facts.block_size:
            raise InvalidInputError(
                f"bit_exact verifies at most the bundle's block of {facts.block_size} tokens, the drafter's block has "
                f"{drafter.block_size}; make one of at most {facts.block_size}"
            )
        if mode == "scheduled":
            if scheduling is None:
                raise InvalidInputError("mode 'scheduled' needs a scheduling; Generator.open makes one of the profile")
            if scheduling.width != self._verifier.width:
                raise InvalidInputError(
                    f"the scheduling has the width {scheduling.width}, expected {self._verifier.width}; "
                    "StreamScheduling takes the verifications' width where bit_exact is on, and None elsewhere"
                )
            return drafter, scheduling
        length = self.options.verify_length or drafter.block_size
        if length > drafter.block_size:
            raise InvalidInputError(f"verify_length is {length}, the drafter's block has {drafter.block_size} tokens")
        self._length = length
        return drafter, None

    def _policy(self, params: SamplingParams) -> Policy:
        if self._scheduling is not None:
            return self._scheduling.policy(params)
        return FixedLength(self._length)

    def _reuse(self, token_ids: list[int]) -> int:
        """Leading tokens that the caches hold already; at least one is left to run, for its logits."""
        if self._sequence is None:
            return 0
        valid = self._sequence.cache_length
        if self.options.bit_exact:
            valid = min(valid, self._sequence.prompt_length)
        known = self._sequence.token_ids[:valid]
        shared = 0
        for cached, wanted in zip(known, token_ids[:-1], strict=False):
            if cached != wanted:
                break
            shared += 1
        return whole_chunks(shared) if self.options.bit_exact else shared

    def _decode(self, token_ids: list[int], params: SamplingParams) -> Iterator[Piece]:
        started = perf_counter()
        reused = self._reuse(token_ids)
        sequence = Sequence(list(token_ids), len(token_ids), reused)
        request = Request(sequence, params, RandomStream(params.seed))
        policy = self._policy(params)
        tally = Tally(len(token_ids), reused)
        answer = Answer(sequence, params, self._encoder.eos_ids, self.capacity, self.tokenizer)
        self._sequence = None  # until a call has ended well, the caches are nobody's
        verdict = self._verifier.prefill(request)
        sequence.commit((verdict.next_id,), verdict.log_probs)
        self._sequence = sequence
        text = answer.take_in()
        tally.time_to_first_token_s = perf_counter() - started
        self._totals.add_prefill(tally.time_to_first_token_s)
        while True:
            if answer.finish_reason is None and self._cancelled.is_set():
                answer.finish_reason = "cancelled"
            if answer.finish_reason is not None:
                text += answer.finish_text()
                generation = answer.result(tally)
                self._totals.end_request(len(token_ids), len(generation.token_ids))
                yield Piece(text, answer.last_ids, generation)
                return
            yield Piece(text, answer.last_ids)
            if self._sequence is not sequence:
                raise InvalidInputError(
                    "another generation was started, or the generator closed; this one cannot go on"
                )
            round_started = perf_counter()
            self._sequence = None
            record = decode_round(request, self._verifier, self._drafter, policy)
            self._sequence = sequence
            text = answer.take_in()
            tally.add(record)
            seconds = perf_counter() - round_started
            tally.decode_s += seconds
            self._totals.add_step((record,), seconds)
            if self._observer is not None:
                self._observer(record)
