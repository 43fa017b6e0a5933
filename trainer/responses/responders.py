"""Who answers questions: the protocol, and what all responders share. Imports no torch.

Every sequence draws its random numbers from a stream of its own, so a response depends on its question and on the
wave that it is answered in, not on what was run before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dspark_edge.runtime.sampling import RandomStream

__all__ = ["Answer", "Question", "Responder", "draw_uniforms"]


@dataclass(frozen=True, slots=True)
class Question:
    """Token ids to go on from, and how."""

    token_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The new ids, the end-of-text id included where there is one."""

    token_ids: tuple[int, ...]
    finish_reason: str  # stop | length


class Responder(Protocol):
    """Answers a wave of questions together."""

    @property
    def capacity(self) -> int | None:
        """Most tokens of a question and its answer together; None: no limit of its own."""

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers in the questions' order."""


def draw_uniforms(questions: Sequence[Question]) -> npt.NDArray[np.float32]:
    """[B, most new tokens] fp32; a question's numbers depend on its seed alone."""
    most = max(question.max_new_tokens for question in questions)
    drawn = np.zeros((len(questions), most), dtype=np.float32)
    for row, question in enumerate(questions):
        if question.temperature > 0:
            drawn[row, : question.max_new_tokens] = RandomStream(question.seed).uniforms(question.max_new_tokens)
    return drawn
