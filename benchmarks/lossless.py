"""Greedy answers in plain and static mode, token by token: they must be the same.

    python benchmarks/lossless.py BUNDLE PROMPTS.jsonl [--limit 40] [--max-new-tokens 128]

A wider verification runs other kernels than one-token decoding, so logits can differ in their last bits; should two
answers part, the line shows how close the target's two favourites were there (log-probabilities of either token).
Prints accepted length and tokens/s on the way; the exit code is 1 if any answer differs.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

from dspark_edge.runtime import Generation, Generator, SamplingParams
from dspark_edge.runtime.prompts import read_prompt_records


def parting(plain: Generation, static: Generation) -> int | None:
    """Index of the first token in which two answers differ; None if they are the same."""
    if plain.token_ids == static.token_ids:
        return None
    pairs = zip(plain.token_ids, static.token_ids, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(plain.token_ids), len(static.token_ids)))


def speed(answers: list[Generation]) -> float:
    """Tokens/s of decoding over all answers."""
    seconds = sum(one.statistics.draft_s + one.statistics.verify_s + one.statistics.host_s for one in answers)
    return sum(one.statistics.new_tokens - 1 for one in answers) / seconds if seconds else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    arguments = parser.parse_args()
    params = SamplingParams(max_new_tokens=arguments.max_new_tokens)
    answers: dict[str, list[Generation]] = {"plain": [], "static": []}
    different = 0
    with (
        Generator.open(arguments.bundle, mode="plain") as plain,
        Generator.open(arguments.bundle, mode="static") as static,
    ):
        for number, record in enumerate(islice(read_prompt_records(arguments.prompts), arguments.limit), start=1):
            prompt = record.opening
            one, other = plain.generate(prompt, params), static.generate(prompt, params)
            answers["plain"].append(one)
            answers["static"].append(other)
            index = parting(one, other)
            if index is not None:
                different += 1
                print(
                    f"prompt {number}: differs at token {index}: plain {one.token_ids[index : index + 1]} at "
                    f"{one.log_probs[index : index + 1]}, static {other.token_ids[index : index + 1]} at "
                    f"{other.log_probs[index : index + 1]}"
                )
            if number % 10 == 0:
                print(f"{number} prompts, {different} different", flush=True)
    rounds = sum(one.statistics.rounds for one in answers["static"])
    accepted = sum(sum(one.statistics.accepted_lengths) for one in answers["static"])
    print(f"{len(answers['plain'])} prompts, {different} different, accepted length {accepted / max(rounds, 1):.2f}")
    for mode, done in answers.items():
        print(f"{mode:7} {speed(done):6.1f} tokens/s")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
