"""What a training run is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.exporter.configuration import DecoderConfig, DrafterConfig
from dspark_edge.trainer.training.initialization import WARM_STARTS
from dspark_edge.trainer.training.objective import CONFIDENCE_TARGETS

__all__ = ["HEADS", "OPTIMIZERS", "PARTS", "DrafterSettings", "TrainingSettings", "automatic_taps"]

OPTIMIZERS = ("muon", "adamw")
"""muon: for the layers' matrices, AdamW for the rest; adamw: for all."""

PARTS = ("all", "confidence")
"""confidence: the confidence head alone, of a drafter that stays as it is, best on responses that it was not trained
on: a drafter knows its own training responses too well to tell from them how often it is right."""

HEADS = ("vanilla", "gated", "rnn", "none")

_AUTOMATIC_TAPS = 5


def automatic_taps(num_layers: int) -> tuple[int, ...]:
    """Five layers from the second to the third from the end, evenly spread (as DeepSpec's default)."""
    first, last = min(1, num_layers - 2), max(0, num_layers - 3)
    count = max(1, min(_AUTOMATIC_TAPS, last - first + 1))
    if count == 1:
        return (max(first, last),)
    return tuple(round(first + index * (last - first) / (count - 1)) for index in range(count))


@dataclass(frozen=True, slots=True)
class DrafterSettings:
    """The drafter's shape.

    Raises:
        InvalidInputError: a value is out of range.
    """

    layers: int = 2
    block_size: int = 7
    taps: tuple[int, ...] | None = None  # None: `automatic_taps`
    markov_rank: int = 64
    head: str = "vanilla"  # vanilla | gated | rnn | none
    confidence: bool = True
    confidence_draft_probs: bool = True  # it sees how sure the draft's distribution is; not part of the reference
    draft_vocab: int | None = None  # tokens that it drafts; None: the whole vocabulary
    intermediate_size: int | None = None  # None: the target's
    key_value_heads: int | None = None  # None: the target's
    mask_token_id: int | None = None  # None: a token that the responses never use

    def __post_init__(self) -> None:
        checks = (
            ("layers", self.layers >= 1, "at least 1"),
            ("block_size", 1 <= self.block_size <= 64, "1 to 64"),
            ("markov_rank", self.markov_rank >= 0, "0 (no sequential head) or more"),
            ("head", self.head in HEADS, f"one of: {', '.join(HEADS)}"),
            ("draft_vocab", self.draft_vocab is None or self.draft_vocab >= 1, "at least 1"),
            ("key_value_heads", self.key_value_heads is None or self.key_value_heads >= 1, "at least 1"),
            ("intermediate_size", self.intermediate_size is None or self.intermediate_size >= 1, "at least 1"),
        )
        _refuse_invalid(self, checks)

    def shape(self, target: DecoderConfig, mask_token_id: int) -> DrafterConfig:
        """The configuration of a drafter for a target.

        Raises:
            InvalidInputError: taps or the mask token are out of range.
        """
        taps = self.taps if self.taps is not None else automatic_taps(target.num_layers)
        last = target.num_layers - 2
        if not taps or len(set(taps)) < len(taps) or not all(-1 <= tap <= last for tap in taps):
            raise InvalidInputError(
                f"the taps are {', '.join(map(str, taps)) or 'none'}, expected different layers from -1 (the "
                f"embedding) to {last} (the last but one of {target.num_layers}; the last one's output is what the "
                "head reads)"
            )
        if not 0 <= mask_token_id < target.vocab_size:
            raise InvalidInputError(
                f"mask_token_id is {mask_token_id}, expected a token of the vocabulary of {target.vocab_size}"
            )
        heads = self.key_value_heads or target.num_key_value_heads
        if target.num_attention_heads % heads:
            raise InvalidInputError(
                f"key_value_heads is {heads}, expected a divisor of the target's {target.num_attention_heads} heads"
            )
        rank = 0 if self.head == "none" else self.markov_rank
        backbone = DecoderConfig(
            family="qwen3",
            vocab_size=target.vocab_size,
            hidden_size=target.hidden_size,
            intermediate_size=self.intermediate_size or target.intermediate_size,
            num_layers=self.layers,
            num_attention_heads=target.num_attention_heads,
            num_key_value_heads=heads,
            head_dim=target.head_dim,
            rms_norm_eps=target.rms_norm_eps,
            rotary=target.rotary,
            max_position_embeddings=target.max_position_embeddings,
            tie_word_embeddings=False,
            attention_bias=False,
            mlp_bias=False,
            bos_token_id=target.bos_token_id,
        )
        partial = self.draft_vocab is not None and self.draft_vocab < target.vocab_size
        return DrafterConfig(
            backbone=backbone,
            num_target_layers=target.num_layers,
            block_size=self.block_size,
            mask_token_id=mask_token_id,
            tap_layers=tuple(taps),
            markov_rank=rank,
            markov_head=self.head if rank else "none",
            confidence=self.confidence,
            confidence_with_markov=self.confidence and rank > 0,
            draft_vocab_size=self.draft_vocab if partial else None,
            confidence_with_draft_probs=self.confidence and self.confidence_draft_probs,
        )


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How it is trained.

    Raises:
        InvalidInputError: a value is out of range.
    """

    steps: int = 2000
    batch: int = 8  # sequences a step, over all processes
    anchors: int = 48  # blocks a sequence
    prompt_anchors: float = 0.0  # share of them that lie in the prompt
    short_share: float = 0.5  # of the steps, the first ones, on blocks of `short_block` tokens, more of them
    short_block: int = 3
    learning_rate: float = 2e-3
    optimizer: str = "muon"  # muon | adamw
    warmup: int = 100  # steps
    weight_decay: float = 0.01
    clip: float = 1.0  # largest norm of the gradients
    cross_entropy: float = 0.1  # weight of the cross-entropy with the tokens that came; the reference's
    confidence_target: str = "overlap"  # overlap | outcome, see `CONFIDENCE_TARGETS`
    divergence: float = 1.0  # weight of the cross-entropy with the target's distribution, at the first step
    divergence_share: float = 0.5  # of the steps, after which that weight has fallen to 0
    regression: float = 0.0  # weight of the distance to the target's hidden states; falls like the divergence's
    warm_start: str = "recent"  # none | recent | target, or the folder of a drafter to go on from
    only: str = "all"  # all | confidence: what is trained, see `PARTS`
    held_out: float = 0.02  # of the prompts
    evaluate_every: int = 200  # steps
    checkpoint_every: int = 200  # steps
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("steps", self.steps >= 1, "at least 1"),
            ("batch", self.batch >= 1, "at least 1"),
            ("anchors", self.anchors >= 1, "at least 1"),
            ("prompt_anchors", 0 <= self.prompt_anchors < 1, "0 or more, and below 1"),
            ("short_share", 0 <= self.short_share <= 1, "between 0 and 1"),
            ("short_block", self.short_block >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            ("optimizer", self.optimizer in OPTIMIZERS, f"one of: {', '.join(OPTIMIZERS)}"),
            ("warmup", self.warmup >= 0, "0 or more"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("clip", self.clip > 0, "above 0"),
            ("cross_entropy", self.cross_entropy >= 0, "0 or more"),
            (
                "confidence_target",
                self.confidence_target in CONFIDENCE_TARGETS,
                f"one of: {', '.join(CONFIDENCE_TARGETS)}",
            ),
            ("divergence", self.divergence >= 0, "0 or more"),
            ("divergence_share", 0 <= self.divergence_share <= 1, "between 0 and 1"),
            ("regression", self.regression >= 0, "0 or more"),
            (
                "warm_start",
                self.warm_start in WARM_STARTS or Path(self.warm_start).is_dir(),
                f"a drafter's folder or one of: {', '.join(WARM_STARTS)}",
            ),
            ("only", self.only in PARTS, f"one of: {', '.join(PARTS)}"),
            (
                "warm_start",
                self.only == "all" or self.warm_start not in WARM_STARTS,
                f"the drafter's folder whose {self.only} shall be trained",
            ),
            ("evaluate_every", self.evaluate_every >= 1, "at least 1"),
            ("checkpoint_every", self.checkpoint_every >= 1, "at least 1"),
            ("seed", self.seed >= 0, "0 or more"),
        )
        _refuse_invalid(self, checks)


def _refuse_invalid(settings: object, checks: Iterable[tuple[str, bool, str]]) -> None:
    """Name the first value that is out of range: (name, valid, expected)."""
    for name, valid, expected in checks:
        if not valid:
            raise InvalidInputError(f"{name} is {getattr(settings, name)!r}, expected {expected}")
