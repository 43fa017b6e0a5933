"""The contenders of benchmarks/peers.py. Each lives in a process of its own, so that libraries, thread pools and
crashes of one are nothing to the others; while one answers, the others sleep at their pipe.

A contender is a context manager that gives a function: it answers a prompt greedily and shows every token to a `Clock`
as soon as it has it. That is all that is asked of it, and the clock is the same for all.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

from peer_report import Timing

INSTALL = "pip install 'dspark-edge[peers]'"


class ContenderError(Exception):
    """A contender cannot go on; the message says why."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a contender is made of."""

    kind: str  # a key of KINDS
    path: str  # bundle, model folder or file
    threads: int
    context: int  # most tokens of a prompt and its answer together
    tokens: int  # most of an answer
    eos_ids: tuple[int, ...]  # an answer ends with one of these
    mode: str = "plain"  # of ours
    lookup: int = 0  # tokens drafted by prompt lookup, of those that have it; 0: plain decoding


class Clock:
    """Takes an answer's tokens as they come, and the times."""

    def __init__(self, tokens: int, eos_ids: Iterable[int], now: Callable[[], float] = perf_counter) -> None:
        self._tokens, self._eos_ids, self._now = tokens, frozenset(eos_ids), now
        self._token_ids: list[int] = []
        self._first = 0  # tokens that the first call gave
        self._started = self._ended = 0.0
        self.done = False

    def show(self, token_ids: Iterable[int]) -> bool:
        """Take the next tokens; those behind the end do not count. Returns whether the answer has ended."""
        self._ended = self._now()
        if not self._token_ids:
            self._started = self._ended
        for token in token_ids:
            if self.done:
                break
            self._token_ids.append(int(token))
            self.done = len(self._token_ids) >= self._tokens or self._token_ids[-1] in self._eos_ids
        self._first = self._first or len(self._token_ids)
        return self.done

    def timing(self) -> Timing:
        return Timing(tuple(self._token_ids), len(self._token_ids) - self._first, self._ended - self._started)


Answer = Callable[[list[int], Clock], None]


@contextmanager
def ours(setup: Setup) -> Iterator[Answer]:
    from dspark_edge.runtime import Generator, SamplingParams

    params = SamplingParams(max_new_tokens=setup.tokens)
    with Generator.open(setup.path, mode=setup.mode, threads=setup.threads) as generator:

        def answer(prompt: list[int], clock: Clock) -> None:
            for piece in generator.stream(prompt, params):
                clock.show(piece.token_ids)

        yield answer


@contextmanager
def transformers(setup: Setup) -> Iterator[Answer]:
    import torch
    from make_genai import write_hugging_face
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(setup.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_hugging_face(setup.path, Path(folder))
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.eval()
    options = {"prompt_lookup_num_tokens": setup.lookup} if setup.lookup else {}

    class Streamer:
        """What `generate` shows its tokens to; the prompt comes first."""

        def __init__(self, clock: Clock) -> None:
            self.clock, self.started = clock, False

        def put(self, token_ids: Any) -> None:
            if self.started:
                self.clock.show(token_ids.reshape(-1).tolist())
            self.started = True

        def end(self) -> None:
            pass

    def answer(prompt: list[int], clock: Clock) -> None:
        input_ids = torch.tensor([prompt])
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            max_new_tokens=setup.tokens,
            eos_token_id=list(setup.eos_ids),
            pad_token_id=setup.eos_ids[0],
            streamer=Streamer(clock),
            **options,
        )

    yield answer


@contextmanager
def genai(setup: Setup) -> Iterator[Answer]:
    import onnxruntime_genai

    library: Any = onnxruntime_genai
    config = library.Config(setup.path)
    session = {"intra_op_num_threads": setup.threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = library.Model(config)

    def answer(prompt: list[int], clock: Clock) -> None:
        params = library.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=len(prompt) + setup.tokens)
        generator = library.Generator(model, params)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
            if clock.show(generator.get_next_tokens()):
                break

    yield answer


@contextmanager
def llama(setup: Setup) -> Iterator[Answer]:
    from llama_cpp import Llama
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    with closing(
        Llama(
            setup.path,
            n_ctx=setup.context + setup.lookup + 1,
            n_threads=setup.threads,
            n_threads_batch=setup.threads,
            n_gpu_layers=0,
            draft_model=LlamaPromptLookupDecoding(num_pred_tokens=setup.lookup) if setup.lookup else None,
            verbose=False,
        )
    ) as model:

        def answer(prompt: list[int], clock: Clock) -> None:
            with closing(model.generate(prompt, temp=0.0)) as stream:
                for token in stream:
                    if clock.show([token]):
                        break

        yield answer


KINDS: dict[str, Callable[[Setup], AbstractContextManager[Answer]]] = {
    "ours": ours,
    "transformers": transformers,
    "genai": genai,
    "llama": llama,
}


def serve(setup: Setup, connection: Connection) -> None:
    """The contender's process: ready, then a timing for every prompt; a text is an error, and the last message."""
    try:
        with KINDS[setup.kind](setup) as answer:
            connection.send(None)
            while (prompt := connection.recv()) is not None:
                clock = Clock(setup.tokens, setup.eos_ids)
                answer(prompt, clock)
                connection.send(clock.timing())
    except ImportError as error:
        connection.send(f"{error}; install it: {INSTALL}")
    except Exception as error:  # whatever a library raises is a line of the report
        connection.send(f"{type(error).__name__}: {error}".strip())


class Contender:
    """A contender's process, seen from outside. A context manager."""

    def __init__(self, setup: Setup, patience_s: float) -> None:
        self._setup, self._patience_s = setup, patience_s

    def __enter__(self) -> Contender:
        """Start it and wait until it is ready.

        Raises:
            ContenderError: it is not; its process is gone.
        """
        context = multiprocessing.get_context("spawn")  # forked threads and locks belong to nobody
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(self._setup, theirs), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def answer(self, prompt: list[int]) -> Timing:
        """Raises ContenderError where there is no answer."""
        try:
            self._connection.send(prompt)
        except OSError:
            raise ContenderError(self._death()) from None
        timing = self._receive()
        if not isinstance(timing, Timing) or not timing.token_ids:
            raise ContenderError("it gave no token")
        return timing

    def close(self) -> None:
        if self._process.is_alive():
            with suppress(OSError):  # it is ending by itself
                self._connection.send(None)
            self._process.join(timeout=10)
            if self._process.is_alive():
                self._process.kill()
        self._process.join()
        self._connection.close()

    def _receive(self) -> Timing | None:
        try:
            if not self._connection.poll(self._patience_s):
                self._process.kill()
                raise ContenderError(f"no answer within {self._patience_s:.0f} s")
            message: Timing | str | None = self._connection.recv()
        except (EOFError, OSError):
            raise ContenderError(self._death()) from None
        if isinstance(message, str):
            raise ContenderError(message)
        return message

    def _death(self) -> str:
        self._process.join(timeout=10)
        code = self._process.exitcode
        return f"its process ended with exit code {code}" + (" (a crash)" if code is not None and code < 0 else "")
