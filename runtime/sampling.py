"""What a request asks of sampling, and its stream of random numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dspark_edge.engines.errors import InvalidInputError

__all__ = ["RandomStream", "SamplingParams"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is decoded.

    Filters apply in the order temperature, top-k, top-p, min-p, each on what the one before left.

    Raises:
        InvalidInputError: a value is out of range.
    """

    max_new_tokens: int | None = 256  # None: until the capacity is reached
    temperature: float = 0.0  # 0: greedy
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    seed: int | None = None  # None: different at every call
    stop: tuple[str, ...] = ()  # texts that end the answer; not part of it
    stop_token_ids: tuple[int, ...] = ()  # beside the model's own end-of-text ids
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise InvalidInputError(f"stop is {self.stop!r}, expected a tuple of texts that are not empty")
        checks = (
            ("max_new_tokens", self.max_new_tokens is None or self.max_new_tokens >= 1, "at least 1"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a number ≥ 0"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
        )
        for name, valid, expected in checks:
            if not valid:
                raise InvalidInputError(f"{name} is {getattr(self, name)}, expected {expected}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filtered(self) -> bool:
        """Whether top-k, top-p or min-p are on."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def sampler_role(self) -> str:
        """The bundle's graph that accepts and draws for such a request."""
        if self.greedy:
            return "sampler_greedy"
        return "sampler_filtered" if self.filtered else "sampler"


@dataclass(slots=True)
class RandomStream:
    """A request's random numbers: equal seeds give equal streams."""

    seed: int | None
    _generator: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._generator = np.random.default_rng(self.seed)

    def uniforms(self, *shape: int) -> npt.NDArray[np.float32]:
        """Uniform in [0, 1)."""
        return self._generator.random(shape, dtype=np.float32)

    def gumbels(self, *shape: int) -> npt.NDArray[np.float32]:
        """Standard Gumbel noise: the argmax of log-probabilities plus it is a draw from them."""
        return self._generator.gumbel(size=shape).astype(np.float32)
