"""What the target says of the training sequences: computed once and kept on disk, as far as a budget allows.

Per token the cache holds the tapped features [T·d] and the hidden state behind the final norm [d] in fp16, and the
logarithm of the normaliser of its logits in fp32: all that a drafter's input and its loss need, so that the target
runs once and not in every epoch. Sequences beyond the budget are computed on the fly when their turn comes.

The files are mapped into memory, filled in order, and a small index beside them says how far: filling that is
interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.trainer.memory import format_bytes
from dspark_edge.trainer.target_model import TargetModel
from dspark_edge.trainer.training.dataset import Example, hash_examples

__all__ = ["FeatureStore", "Features", "features_of", "log_normalizers"]

_INDEX = "index.json"
_FP16_MAX = 65504.0
_SYNC_TOKENS = 50_000
# Tokens of one forward pass on a CPU: few enough for activations to stay in its caches, enough for its kernels.
_CPU_TOKENS = 768
_GPU_TOKENS = 32_768
_HEAD_ELEMENTS = 1 << 24
_GPU_HEAD_ELEMENTS = 1 << 28

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Features:
    """Of one sequence; from a store in fp16 but for the normalizers."""

    taps: torch.Tensor  # [S, T·d]
    hidden: torch.Tensor  # [S, d] behind the final norm
    log_normalizers: torch.Tensor  # [S] fp32

    def rounded(self) -> Features:
        """As the cache holds them: what is out of fp16's range is cut to it."""
        taps, hidden = (states.float().clamp(-_FP16_MAX, _FP16_MAX).half() for states in (self.taps, self.hidden))
        return Features(taps, hidden, self.log_normalizers)

    def stored(self) -> Features:
        """The same on the host."""
        kept = self.rounded()
        return Features(kept.taps.cpu(), kept.hidden.cpu(), kept.log_normalizers.cpu())


def log_normalizers(target: TargetModel, hidden: torch.Tensor) -> torch.Tensor:
    """hidden [N, d] → log Σ exp(logits) [N] fp32, over the whole vocabulary, piece by piece."""
    on_cpu = hidden.device.type == "cpu"
    step = max(1, (_HEAD_ELEMENTS if on_cpu else _GPU_HEAD_ELEMENTS) // target.config.vocab_size)
    if on_cpu:
        return torch.cat([torch.logsumexp(target.logits(part), dim=-1) for part in hidden.split(step)])
    return torch.cat([_fused_log_normalizers(functional.linear(part, target.head)) for part in hidden.split(step)])


def _fused_log_normalizers(logits: torch.Tensor) -> torch.Tensor:
    """The same by the one kernel of a GPU that reads logits in their own type: logsumexp would write them four times
    in fp32."""
    return logits[:, 0].float() - functional.log_softmax(logits, dim=-1, dtype=torch.float32)[:, 0]


@torch.inference_mode()
def features_of(target: TargetModel, examples: Sequence[Example], taps: Sequence[int]) -> list[Features]:
    """Run the target over some sequences together."""
    longest = max(len(example) for example in examples)
    ids = torch.zeros((len(examples), longest), dtype=torch.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example)] = torch.from_numpy(example.token_ids)
    tapped, hidden = target.features(ids.to(target.device), taps)
    lengths = [len(example) for example in examples]
    # Together, as few tokens are a small part of what a GPU does at once.
    own = torch.cat([hidden[row, :length] for row, length in enumerate(lengths)])
    normalizers = log_normalizers(target, own).split(lengths)
    return [
        Features(tapped[row, :length], hidden[row, :length], normalizers[row]) for row, length in enumerate(lengths)
    ]


class FeatureStore:
    """Features of a list of sequences, from the cache or from the target.

    Args:
        target: computes them.
        examples: the sequences.
        taps: tapped layers.
        folder: where the cache lies; made if it is not there.
        budget: most bytes of the cache; 0 keeps none.
    """

    def __init__(
        self, target: TargetModel, examples: Sequence[Example], taps: Sequence[int], folder: Path, budget: int
    ) -> None:
        self._target, self._examples, self._taps = target, examples, tuple(taps)
        self._folder = folder
        hidden = target.config.hidden_size
        self._width = (len(taps) + 1) * hidden
        self.bytes_per_token = 2 * self._width + 4
        # A sequence that is given more than once, to weigh more, is computed and kept once.
        distinct: dict[bytes, Example] = {}
        for example in examples:
            distinct.setdefault(example.token_ids.tobytes(), example)
        places = {ids: place for place, ids in enumerate(distinct)}
        self._places = [places[example.token_ids.tobytes()] for example in examples]
        self._distinct = list(distinct.values())
        offsets = np.concatenate(([0], np.cumsum([len(example) for example in self._distinct])))
        # Sequences that fit, from the first on.
        self.cached = int(np.searchsorted(offsets * self.bytes_per_token, max(0, budget), side="right")) - 1
        self._offsets = offsets
        self.tokens = int(offsets[self.cached])
        digest = f"{hash_examples(examples)} {target.fingerprint()} {self._taps} {self.cached}"
        self._digest = hashlib.sha256(digest.encode()).hexdigest()
        self._states: np.memmap | None = None
        self._normalizers: np.memmap | None = None

    @property
    def size(self) -> int:
        """Bytes of the whole cache."""
        return self.tokens * self.bytes_per_token

    def describe(self) -> str:
        """One line, before anything is computed."""
        total = int(self._offsets[-1])
        if self.cached == 0:
            return f"features: {total} tokens, computed on the fly"
        rest = "" if self.cached == len(self._distinct) else f"; {total - self.tokens} more computed on the fly"
        return f"features: {self.tokens} tokens in a cache of {format_bytes(self.size)} at {self._folder}{rest}"

    def fill(self, report: Report | None = None) -> None:
        """Compute what the cache lacks; report hears tokens done and in all.

        Raises:
            InvalidInputError: the disk is full, or the folder cannot be written.
        """
        if self.cached == 0:
            return
        try:
            done = self._open()
            if done < self.cached:
                self._reserve()
                self._fill(done, report)
        except OSError as error:
            raise InvalidInputError(
                f"cannot write the feature cache in {self._folder}: {error.strerror or error}; it needs "
                f"{format_bytes(self.size)} (lower it with --cache-gb)"
            ) from None

    def sample(self, sequences: int = 64) -> torch.Tensor:
        """Features of some sequences' tokens, [N, T·d] fp32.

        First tokens are left out: their states are many times those of all others (attention sinks).
        """
        return torch.cat([self.load(index).taps[1:].float() for index in range(min(sequences, len(self._examples)))])

    def close(self) -> None:
        """Release the mapped files."""
        self._states = self._normalizers = None

    def load_all(self, indices: Sequence[int]) -> list[Features]:
        """The features of some sequences: those in the cache on the host, the others, computed together, where the
        target is."""
        loaded = {index: self.load(index) for index in indices if self._places[index] < self.cached}
        missing = [index for index in indices if index not in loaded]
        for places in self._parts([len(self._examples[index]) for index in missing]):
            part = missing[places]
            found = features_of(self._target, [self._examples[index] for index in part], self._taps)
            loaded |= zip(part, (features.rounded() for features in found), strict=True)
        return [loaded[index] for index in indices]

    def _parts(self, lengths: Sequence[int]) -> Iterator[slice]:
        """Sequences of these lengths, cut into forward passes of so many tokens, padding included."""
        first = longest = 0
        for place, length in enumerate(lengths):
            longest = max(longest, length)
            if place > first and longest * (place + 1 - first) > self._tokens_at_once:
                yield slice(first, place)
                first, longest = place, length
        if first < len(lengths):
            yield slice(first, len(lengths))

    @property
    def _tokens_at_once(self) -> int:
        return _CPU_TOKENS if self._target.device.type == "cpu" else _GPU_TOKENS

    def load(self, index: int) -> Features:
        """The features of a sequence, on the host in fp16, wherever they come from."""
        place = self._places[index]
        if place >= self.cached:
            return features_of(self._target, [self._examples[index]], self._taps)[0].stored()
        if self._states is None or self._normalizers is None:
            raise RuntimeError("the cache is read before it is filled")
        rows = slice(int(self._offsets[place]), int(self._offsets[place + 1]))
        states = torch.from_numpy(np.array(self._states[rows]))
        split = self._width - self._target.config.hidden_size
        return Features(states[:, :split], states[:, split:], torch.from_numpy(np.array(self._normalizers[rows])))

    def _open(self) -> int:
        """Map the files; returns the sequences that are in them already."""
        self._folder.mkdir(parents=True, exist_ok=True)
        shape = (self.tokens, self._width)
        names, sizes = self._files()
        whole = all(name.exists() and name.stat().st_size == size for name, size in zip(names, sizes, strict=True))
        done = self._recorded() if whole else 0
        if done == 0:
            # Before the first byte changes: an index must never speak of what is not there any more.
            (self._folder / _INDEX).unlink(missing_ok=True)
        mode: Literal["r+", "w+"] = "r+" if whole else "w+"
        self._states = np.memmap(names[0], dtype=np.float16, mode=mode, shape=shape)
        self._normalizers = np.memmap(names[1], dtype=np.float32, mode=mode, shape=shape[:1])
        return done

    def _recorded(self) -> int:
        try:
            index = json.loads((self._folder / _INDEX).read_text(encoding="utf-8"))
            return min(int(index["sequences"]), self.cached) if index["digest"] == self._digest else 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0  # a cache without its index is no cache

    def _files(self) -> tuple[tuple[Path, Path], tuple[int, int]]:
        """States and normalizers: paths, and bytes."""
        names = (self._folder / "states.fp16", self._folder / "normalizers.fp32")
        return names, (2 * self.tokens * self._width, 4 * self.tokens)

    def _reserve(self) -> None:
        """Take the disk space now: a mapped file has holes, and a full disk would end the process with SIGBUS."""
        names, sizes = self._files()
        taken = sum(512 * name.stat().st_blocks for name in names)
        disk = os.statvfs(self._folder)
        needed, free = sum(sizes) - taken, disk.f_bavail * disk.f_frsize
        if needed > free:
            raise InvalidInputError(
                f"the feature cache needs {format_bytes(needed)} more in {self._folder}, {format_bytes(free)} are "
                "free; lower it with --cache-gb, or give another --cache"
            )
        for name, size in zip(names, sizes, strict=True):
            with name.open("r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, size)

    def _fill(self, done: int, report: Report | None) -> None:
        if self._states is None or self._normalizers is None:
            raise RuntimeError("the cache is filled before it is opened")
        synced = int(self._offsets[done])
        waiting = self._distinct[done : self.cached]
        for part in self._parts([len(example) for example in waiting]):
            for found in features_of(self._target, waiting[part], self._taps):
                rows = slice(int(self._offsets[done]), int(self._offsets[done + 1]))
                kept = found.stored()
                self._states[rows] = torch.cat((kept.taps, kept.hidden), dim=-1).numpy()
                self._normalizers[rows] = kept.log_normalizers.numpy()
                done += 1
            if int(self._offsets[done]) - synced >= _SYNC_TOKENS or done == self.cached:
                self._record(done)
                synced = int(self._offsets[done])
            if report is not None:
                report(int(self._offsets[done]), self.tokens)

    def _record(self, done: int) -> None:
        """Write what there is, then the index: never the other way round."""
        if self._states is None or self._normalizers is None:
            raise RuntimeError("the cache is recorded before it is opened")
        self._states.flush()
        self._normalizers.flush()
        index = self._folder / _INDEX
        temporary = index.with_suffix(".tmp")
        temporary.write_text(json.dumps({"digest": self._digest, "sequences": done}), encoding="utf-8")
        os.replace(temporary, index)
