"""A responder that runs the target in torch: the way to large batches, on a CPU as on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from dspark_edge.trainer.responses.responders import Answer, Question, draw_uniforms
from dspark_edge.trainer.target_model import KeyValueCache, TargetModel

__all__ = ["TorchResponder", "pick"]

_PREFILL_TOKENS = 4096
# Caches are copied without the finished sequences when so many are finished.
_COMPACT_BELOW = 0.85
_PICK_BLOCK = 256


def pick(logits: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Next tokens: the argmax at temperature 0, a draw by the inverse of the distribution function above.

    Args:
        logits: [B, V] fp32.
        temperatures: [B] fp32.
        uniforms: [B] fp32 in [0, 1).

    Returns:
        [B] int64.
    """
    chosen = logits.argmax(dim=-1)
    drawing = (temperatures > 0).nonzero().squeeze(1)
    if len(drawing):
        rows = logits if len(drawing) == len(logits) else logits[drawing]
        rows = torch.exp((rows - logits.amax(dim=-1)[drawing, None]) / temperatures[drawing, None])
        # In two steps, first the block and then the token in it: a running sum over the whole vocabulary is slow.
        blocks = functional.pad(rows, (0, -rows.shape[1] % _PICK_BLOCK)).unflatten(1, (-1, _PICK_BLOCK))
        block, rest = _invert(blocks.sum(dim=-1), uniforms[drawing])
        inside = blocks[torch.arange(len(drawing), device=logits.device), block]
        token, _ = _invert(inside, rest)
        chosen[drawing] = (block * _PICK_BLOCK + token).clamp(max=logits.shape[1] - 1)
    return chosen


def _invert(masses: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw from masses [B, N] by uniforms [B]: which, and where in it the draw fell, uniform in [0, 1) again."""
    cumulative = masses.double().cumsum(dim=-1)
    # Scaled to what the sum really is: rounding must not let a draw fall behind the last one.
    point = uniforms.double() * cumulative[:, -1]
    index = torch.searchsorted(cumulative, point[:, None], right=True).squeeze(1).clamp(max=masses.shape[1] - 1)
    mass = masses.gather(1, index[:, None]).squeeze(1).double()
    before = cumulative.gather(1, index[:, None]).squeeze(1) - mass
    rest = ((point - before) / mass.clamp(min=1e-300)).clamp(0.0, 1.0 - 1e-7)
    return index, rest.float()


class TorchResponder:
    """The target in torch on any device.

    Args:
        target: the model.
        eos_ids: tokens that end an answer.
    """

    def __init__(self, target: TargetModel, eos_ids: Sequence[int]) -> None:
        self._target = target
        self._eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.int64, device=target.device)

    @property
    def capacity(self) -> int | None:
        return self._target.module.rotary.cos.shape[0]

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """See `Responder`.

        Raises:
            InvalidInputError: the caches of so many sequences do not fit in memory.
        """
        device = self._target.device
        limits = torch.tensor([question.max_new_tokens for question in questions], device=device)
        temperatures = torch.tensor([question.temperature for question in questions], device=device)
        uniforms = torch.from_numpy(draw_uniforms(questions)).to(device)
        cache, logits = self._prefill(questions)
        written = torch.zeros((len(questions), int(limits.max())), dtype=torch.int64, device=device)
        counts = torch.zeros(len(questions), dtype=torch.int64, device=device)
        stopped = torch.zeros(len(questions), dtype=torch.bool, device=device)
        active = torch.arange(len(questions), device=device)  # the question of each row of the cache
        done = torch.zeros(len(questions), dtype=torch.bool, device=device)  # by row
        step = 0
        while True:
            tokens = pick(logits, temperatures[active], uniforms[active, step])
            running = active[~done]
            written[running, step] = tokens[~done]
            counts[running] += 1
            stopped[running] = torch.isin(tokens[~done], self._eos_ids)
            step += 1
            done = done | stopped[active] | (limits[active] <= step)
            if bool(done.all()):
                break
            remaining = (~done).nonzero().squeeze(1)
            if len(remaining) <= _COMPACT_BELOW * len(active):
                cache.keep(remaining)
                active, tokens, done = active[remaining], tokens[remaining], done[remaining]
            logits = self._target.step(tokens, cache)
            cache.lengths += ~done  # what is finished writes its one slot again and again
        rows = written.tolist()
        return [
            Answer(tuple(row[:count]), "stop" if stop else "length")
            for row, count, stop in zip(rows, counts.tolist(), stopped.tolist(), strict=True)
        ]

    def _prefill(self, questions: Sequence[Question]) -> tuple[KeyValueCache, torch.Tensor]:
        """Caches with every question, and the logits [B, V] behind them."""
        device = self._target.device
        lengths = [len(question.token_ids) for question in questions]
        room = max(len(question.token_ids) + question.max_new_tokens for question in questions)
        cache = self._target.allocate(len(questions), room)
        logits = []
        rows = max(1, _PREFILL_TOKENS // max(lengths))
        for first in range(0, len(questions), rows):
            part = lengths[first : first + rows]
            ids = torch.zeros((len(part), max(part)), dtype=torch.int64)
            for row, length in enumerate(part):
                ids[row, :length] = torch.tensor(questions[first + row].token_ids)
            logits.append(self._target.prefill(ids.to(device), torch.tensor(part, device=device), cache, first))
        return cache, torch.cat(logits)
