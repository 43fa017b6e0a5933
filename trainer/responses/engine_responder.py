"""Responders that run a bundle: what is on the user's machine anyway, without the checkpoint.

A bundle that decodes one sequence at a time answers one question after another, with its drafter if it has one (which
changes no token, and nothing of the distribution). One that was exported for batches answers a wave together.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_edge.engines.engine import Buffer, Call, Engine, sized
from dspark_edge.runtime.generator import Generator
from dspark_edge.runtime.sampling import SamplingParams
from dspark_edge.trainer.responses.responders import Answer, Question, draw_uniforms

__all__ = ["BatchResponder", "GeneratorResponder"]


class GeneratorResponder:
    """One question after another.

    Args:
        generator: of the bundle.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    @property
    def capacity(self) -> int | None:
        return self._generator.capacity

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        answers = []
        for question in questions:
            # What the caches hold of the question before would be reused; the answers would then depend, in their
            # last bits, on where an interrupted run started again.
            self._generator.reset()
            generation = self._generator.generate(
                list(question.token_ids),
                SamplingParams(
                    max_new_tokens=question.max_new_tokens, temperature=question.temperature, seed=question.seed
                ),
            )
            answers.append(Answer(generation.token_ids, generation.finish_reason))
        return answers


class BatchResponder:
    """A wave together, by plain decoding.

    Args:
        engine: with a bundle whose lowering decodes batches.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        manifest = engine.bundle.manifest
        self._capacity = manifest.limits.capacity
        self._eos_ids = np.array(manifest.target.eos_token_ids, dtype=np.int64)
        self._rows: _Rows | None = None

    @property
    def capacity(self) -> int | None:
        return self._capacity

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        batch = len(questions)
        if self._rows is None or self._rows.batch != batch:
            self._rows = None  # its memory is free before the next is taken
            self._rows = _Rows(self._engine, batch)
        rows = self._rows
        limits = np.array([question.max_new_tokens for question in questions])
        temperatures = np.array([question.temperature for question in questions], dtype=np.float32)
        uniforms = draw_uniforms(questions)
        written = np.zeros((batch, int(limits.max())), dtype=np.int64)
        counts = np.zeros(batch, dtype=np.int64)
        stopped = np.zeros(batch, dtype=bool)
        lengths = np.array([len(question.token_ids) for question in questions])
        rows.prefill([question.token_ids for question in questions])
        step = 0
        while True:
            tokens = rows.draw(temperatures, uniforms[:, step])
            running = ~stopped & (step < limits)
            written[running, step] = tokens[running]
            counts[running] += 1
            stopped |= running & np.isin(tokens, self._eos_ids)
            step += 1
            running = ~stopped & (step < limits)
            if not running.any():
                break
            rows.step(tokens, lengths)
            lengths[running] += 1  # the others write their one slot again and again
        return [
            Answer(tuple(row[:count]), "stop" if stop else "length")
            for row, count, stop in zip(written.tolist(), counts.tolist(), stopped.tolist(), strict=True)
        ]


class _Rows:
    """Caches and calls for one number of sequences."""

    def __init__(self, engine: Engine, batch: int) -> None:
        self._engine, self.batch = engine, batch
        manifest = engine.bundle.manifest
        self._graph = manifest.graphs["target"]
        sizes = {"batch": batch}
        self._caches = {
            spec.name: engine.allocate(spec.dtype, sized(spec, sizes))
            for spec in self._graph.inputs
            if spec.name.startswith(("past_key_values.", "drafter.past."))
        }
        self._lengths = engine.allocate("int64", (batch,))
        self._logits = engine.allocate("float32", (batch, 1, manifest.target.vocab_size))
        self._input_ids, self._call, _ = self._bind(1)
        sampler = manifest.graphs["sampler"]
        sizes |= {"rows": 1, "block": 1, "candidates": 1}
        self._sampler: dict[str, Buffer] = {
            spec.name: self._logits if spec.name == "logits" else engine.allocate(spec.dtype, sized(spec, sizes))
            for spec in (*sampler.inputs, *sampler.outputs)
        }
        self._sample = engine.bind("sampler", self._sampler)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Run all prompts at once, padded behind; their padding's slots are overwritten later."""
        width = max(len(prompt) for prompt in prompts)
        input_ids, call, logit_rows = self._bind(width)
        padded = np.zeros((self.batch, width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = prompt
        input_ids.write(padded)
        logit_rows.write(np.array([[len(prompt) - 1] for prompt in prompts]))
        self._lengths.write(0)
        call.run()

    def step(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Run one token of each sequence behind its cache."""
        self._input_ids.write(tokens[:, None])
        self._lengths.write(lengths)
        self._call.run()

    def draw(self, temperatures: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """The next token of each sequence, [B] int64."""
        self._sampler["temperature"].write(temperatures)
        self._sampler["sample_uniforms"].write(uniforms)
        self._sample.run()
        next_ids: np.ndarray = self._sampler["next_ids"].read().copy()
        return next_ids

    def _bind(self, width: int) -> tuple[Buffer, Call, Buffer]:
        input_ids = self._engine.allocate("int64", (self.batch, width))
        logit_rows = self._engine.allocate("int64", (self.batch, 1))
        buffers = {
            "input_ids": input_ids,
            "cache_lengths": self._lengths,
            "logit_rows": logit_rows,
            "logits": self._logits,
            **self._caches,
        }
        return input_ids, self._engine.bind("target", buffers), logit_rows
