"""Answer a prompt from a bundle, then compare plain and speculative decoding on a few more.

python examples/demo.py BUNDLE ["A prompt"] [--mode static]

Without --mode decoding is scheduled where `dspark-edge profile BUNDLE` has measured the device, and static elsewhere.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from dspark_edge.runtime import Generation, Generator, SamplingParams

PROMPT = "Explain in three sentences why the sky is blue."
# Prompts of the kinds that people send.
ROLLS = "A baker sells 36 rolls in the morning and twice as many in the afternoon, for $0.50 each. How much is that?"
PENCILS = "Tom has 3 boxes with 12 pencils each and gives 5 pencils to each of 4 friends. How many does he have left?"
TRAIN = "A train travels 60 miles an hour for 2 hours and then 45 miles an hour for 4 hours. How far does it travel?"
PALINDROME = "Write a Python function that checks whether a word is a palindrome, with a docstring and two examples."
LARGEST = "Write a Python function that returns the n largest numbers of a list without sorting it in place."
SPELLING = (
    "Correct the spelling and repeat the whole text: 'The wether was good, so we went to the beech and we swam in the "
    "see untill the sun went down, and then we walked home allong the river.'"
)
COMPARED: Mapping[str, Sequence[str]] = {
    "math": (ROLLS, PENCILS, TRAIN),
    "code": (PALINDROME, LARGEST),
    "chat": (PROMPT, SPELLING),
}
PARAMS = SamplingParams(max_new_tokens=128)


def answer(generator: Generator, prompt: str, show: bool = False) -> Generation:
    """One answer, streamed to the terminal if asked."""
    for piece in generator.stream(prompt, PARAMS):
        if show:
            print(piece.text, end="", flush=True)
        if piece.generation is not None:
            return piece.generation
    raise RuntimeError("a stream ended without its generation")


def tokens_per_second(answers: Sequence[Generation]) -> float:
    """Decoding speed over all answers, prefill left out."""
    tokens = sum(one.statistics.new_tokens - 1 for one in answers)
    seconds = sum(one.statistics.draft_s + one.statistics.verify_s + one.statistics.host_s for one in answers)
    return tokens / seconds


def accepted_length(answers: Sequence[Generation]) -> float:
    """Committed tokens a round."""
    rounds = sum(one.statistics.rounds for one in answers)
    return sum(sum(one.statistics.accepted_lengths) for one in answers) / max(rounds, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--mode", choices=("static", "scheduled"), help="of speculative decoding")
    given = parser.parse_args()
    with (
        Generator.open(given.bundle, mode="plain") as plain,
        Generator.open(given.bundle, mode=given.mode) as speculative,
    ):
        print(f"> {given.prompt}\n")
        answer(speculative, given.prompt, show=True)
        mode = speculative.options.mode
        print(f"\n\n{mode} decoding, drafter: {speculative.bundle.manifest.drafter.kind}")
        print(f"prompts   plain tokens/s   {mode:>11}   ratio   accepted length   same tokens")
        everything: list[tuple[Generation, Generation]] = []
        for kind, prompts in COMPARED.items():
            pairs = []
            for prompt in prompts:  # in turn, so that a busy machine slows both
                plain.reset()
                speculative.reset()
                pairs.append((answer(plain, prompt), answer(speculative, prompt)))
            print(row(kind, pairs), flush=True)
            everything += pairs
        print(row("all", everything))
    return 0 if all(a.token_ids == b.token_ids for a, b in everything) else 1


def row(kind: str, pairs: Sequence[tuple[Generation, Generation]]) -> str:
    """A line of the table."""
    before, after = ([pair[side] for pair in pairs] for side in (0, 1))
    old, new = tokens_per_second(before), tokens_per_second(after)
    same = all(a.token_ids == b.token_ids for a, b in pairs)
    return (
        f"{kind:<7} {old:16.1f} {new:13.1f} {new / old:6.2f}x {accepted_length(after):17.2f}   "
        f"{'yes' if same else 'NO'}"
    )


if __name__ == "__main__":
    sys.exit(main())
