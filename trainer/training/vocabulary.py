"""Which tokens a drafter drafts.

The widest matrix of a small drafter is the head: as wide as the vocabulary, though a model writes most of its text
with few of its tokens. Drafting from these only (as EAGLE-3's draft vocabulary and FR-Spec do) costs the positions
where another token comes, and saves most of the time of training and of drafting. It stays lossless: verification
uses exactly the probabilities that were drafted from.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark_edge.engines.errors import InvalidInputError
from dspark_edge.trainer.training.dataset import Example

__all__ = ["choose_draft_vocabulary", "coverage"]


def response_counts(examples: Sequence[Example], vocab_size: int) -> np.ndarray:
    """How often each token stands in the responses, [V] int64."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for example in examples:
        for first, end in example.answers:
            counts += np.bincount(example.token_ids[first:end], minlength=vocab_size)
    return counts


def choose_draft_vocabulary(examples: Sequence[Example], vocab_size: int, size: int) -> np.ndarray:
    """The `size` tokens that the responses use most, [P] int64, ascending.

    Tokens that they never use are filled up with those that prompts use, then with the lowest ids, which in a
    byte-pair vocabulary are the commonest.

    Raises:
        InvalidInputError: the size is out of range.
    """
    if not 1 <= size <= vocab_size:
        raise InvalidInputError(f"the draft vocabulary is {size}, expected 1 to the vocabulary's {vocab_size} tokens")
    responses = response_counts(examples, vocab_size)
    everything = np.zeros(vocab_size, dtype=np.int64)
    for example in examples:
        everything += np.bincount(example.token_ids, minlength=vocab_size)
    order = np.lexsort((np.arange(vocab_size), -everything, -responses))
    return np.sort(order[:size]).astype(np.int64)


def coverage(examples: Sequence[Example], vocab_size: int, ids: np.ndarray) -> float:
    """The share of response tokens that a draft vocabulary holds."""
    counts = response_counts(examples, vocab_size)
    return float(counts[ids].sum() / max(1, counts.sum()))
