"""The loop: all modes of a place take turns on the same prompts, part by part, in an order that rotates.

Parts are as small as the concurrency allows, so that turns follow each other within seconds: a machine that gets busier
meets all modes alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from dspark_edge.engines.engine import Engine
from dspark_edge.engines.errors import CapacityError, InvalidInputError
from dspark_edge.engines.manifest import Manifest
from dspark_edge.runtime.bench.cells import Cell, Place, cells_of
from dspark_edge.runtime.bench.contenders import Contender, ModelContender, Run, whole
from dspark_edge.runtime.bench.settings import BenchOptions, rotated
from dspark_edge.runtime.encoding import Prompt, PromptEncoder
from dspark_edge.runtime.prompts import PromptRecord
from dspark_edge.runtime.sampling import SamplingParams
from dspark_edge.runtime.scheduling import Costs

__all__ = ["RANDOM_DOMAIN", "Bench", "prompts_by_domain", "random_prompts"]

RANDOM_DOMAIN = "random"
_RANDOM_TOKENS = 64
_WARM_UP_TOKENS = 8

Progress = Callable[[int, int], None]
"""Is told answers done and in all."""


def random_prompts(manifest: Manifest, count: int, seed: int) -> list[list[int]]:
    """Prompts of random token ids: text that no drafter has seen the like of."""
    source = np.random.default_rng(seed)
    drawn: list[list[int]] = source.integers(0, manifest.target.vocab_size, (count, _RANDOM_TOKENS)).tolist()
    return drawn


def prompts_by_domain(records: Sequence[PromptRecord], limit: int | None) -> dict[str, list[Prompt]]:
    """Opening turns by domain, in their order; at most `limit` of each."""
    found: dict[str, list[Prompt]] = {}
    for record in records:
        of_domain = found.setdefault(record.domain, [])
        if limit is None or len(of_domain) < limit:
            of_domain.append(record.opening)
    return found


@dataclass
class Bench:
    """Measures bundles, one after the other, and keeps what was measured so far.

    Args:
        options: what to measure.
        progress: is told after every part of a run.
    """

    options: BenchOptions
    progress: Progress = lambda done, total: None
    cells: list[Cell] = field(default_factory=list)
    done: int = 0
    total: int = 0

    def plan(self, bundles: int, prompts: Sequence[int]) -> None:
        """How many answers there will be, for the progress bar.

        Args:
            prompts: how many each domain has.
        """
        options = self.options
        asked = sum(requests(of_domain, concurrency) for of_domain in prompts for concurrency in options.concurrencies)
        self.total = bundles * asked * len(options.temperatures) * len(options.modes) * options.repeats

    def measure(
        self, name: str, engine: Engine, prompts: Mapping[str, Sequence[Prompt]], costs: Mapping[str, Costs] | None
    ) -> None:
        """Measure a bundle; its cells are there as soon as they are known.

        Args:
            name: of the bundle.
            engine: executes its graphs; stays open.
            prompts: by domain.
            costs: as profiled, by sampler role; None where no mode is scheduled.

        Raises:
            InvalidInputError: a prompt or a mode does not fit the bundle.
            EngineError: the backend failed.
        """
        encoded = encode(engine, prompts, self.options.max_new_tokens)
        references: dict[str, dict[int, tuple[int, ...]]] = {}
        for concurrency in self.options.concurrencies:
            with ExitStack() as stack:
                contenders: list[Contender] = [
                    stack.enter_context(ModelContender(engine, mode, concurrency, costs)) for mode in self.options.modes
                ]
                warm_up(contenders, next(iter(encoded.values())), concurrency)
                for domain, of_domain in encoded.items():
                    for temperature in self.options.temperatures:
                        place = Place(name, engine.bundle.manifest.precision, domain, temperature, concurrency)
                        self._place(place, contenders, of_domain, references)

    def _place(
        self,
        place: Place,
        contenders: Sequence[Contender],
        prompts: Sequence[Prompt],
        references: dict[str, dict[int, tuple[int, ...]]],
    ) -> None:
        """Measure one place.

        Args:
            references: domain → prompt → the first answer of plain decoding; grows.
        """
        options = self.options
        asked = workload(prompts, place.concurrency)
        parts = parts_of(asked, place.concurrency)
        runs: dict[str, list[list[Run]]] = {str(contender.mode): [] for contender in contenders}
        for repeat in range(options.repeats):
            params = [
                SamplingParams(options.max_new_tokens, place.temperature, seed=_seed(options.seed, repeat, index))
                for index in range(len(asked))
            ]
            for of_mode in runs.values():
                of_mode.append([])
            for turn, part in enumerate(parts):
                for index in rotated(len(contenders), repeat + turn):
                    contender = contenders[index]
                    run = contender.run([prompts[asked[at]] for at in part], [params[at] for at in part])
                    runs[str(contender.mode)][-1].append(run)
                    self.done += len(part)
                    self.progress(self.done, self.total)
        reference = None
        if place.temperature == 0 and "plain" in runs:
            # Of one stream, where that is measured: a batch must not change a token either.
            answers = dict(zip(asked, whole(runs["plain"][0]).answers, strict=True))
            known = references.setdefault(place.domain, answers)
            reference = tuple(known[prompt] for prompt in asked)
        self.cells += cells_of(place, runs, reference)


def encode(engine: Engine, prompts: Mapping[str, Sequence[Prompt]], new_tokens: int) -> dict[str, list[Prompt]]:
    """The prompts as token ids, without those that leave too little room for their answers.

    Raises:
        InvalidInputError: a domain has no prompt that fits.
    """
    encoder, capacity = PromptEncoder.of(engine.bundle), engine.bundle.manifest.limits.capacity
    found: dict[str, list[Prompt]] = {}
    for domain, of_domain in prompts.items():
        fitting = []
        for prompt in of_domain:
            try:
                ids = encoder.checked(prompt, SamplingParams(new_tokens), capacity, raw=False)
            except CapacityError:
                continue
            if len(ids) + new_tokens <= capacity:
                fitting.append(ids)
        if not fitting:
            raise InvalidInputError(
                f"no prompt of the domain {domain!r} leaves room for {new_tokens} new tokens in the capacity of "
                f"{capacity}"
            )
        found[domain] = [*fitting]
    return found


def workload(prompts: Sequence[Prompt], concurrency: int) -> list[int]:
    """Which prompts are asked, in which order: each once, and again from the first until there are two for each
    request at a time, so that most rounds are full."""
    return [index % len(prompts) for index in range(requests(len(prompts), concurrency))]


def requests(prompts: int, concurrency: int) -> int:
    """How many answers a repeat takes; see `workload`."""
    return max(prompts, _fewest(concurrency))


def parts_of(asked: Sequence[int], concurrency: int) -> list[range]:
    """The places of a workload in parts: a request each where there is one at a time, else at least two for each
    request at a time."""
    size = _fewest(concurrency)
    bounds = [*range(0, len(asked) - size + 1, size), len(asked)]
    return [range(start, end) for start, end in pairwise(bounds)]


def _fewest(concurrency: int) -> int:
    """Requests of a part: two for each at a time, so that most rounds are full."""
    return 2 * concurrency if concurrency > 1 else 1


def warm_up(contenders: Sequence[Contender], prompts: Sequence[Prompt], concurrency: int) -> None:
    """Bind every call once, and let each graph plan its memory."""
    asked = [prompts[index % len(prompts)] for index in range(concurrency)]
    for contender in contenders:
        contender.run(asked, [SamplingParams(_WARM_UP_TOKENS, seed=0)] * len(asked))


def _seed(seed: int, repeat: int, index: int) -> int:
    """Of a request: the same for all modes, another one for each repeat and request."""
    return int(np.random.SeedSequence((seed, repeat, index)).generate_state(1)[0])
