"""Answer a prompt from a bundle, then compare plain and speculative decoding on a few more.

python examples/demo.py BUNDLE ["A prompt"]
"""

from __future__ import annotations

import sys

from dspark_edge.runtime import Generation, Generator, SamplingParams

PROMPT = "Explain in three sentences why the sky is blue."
# Prompts of the kinds that people send: to reason, to write code, to rework a text.
COMPARED = (
    (
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
        "How many clips did Natalia sell altogether in April and May? Please reason step by step."
    ),
    "Write a Python function that checks whether a word is a palindrome, with a docstring and two examples.",
    (
        "Correct the spelling and repeat the whole text: 'The wether was good, so we went to the beech and we "
        "swam in the see untill the sun went down, and then we walked home allong the river.'"
    ),
)
PARAMS = SamplingParams(max_new_tokens=128)


def answer(generator: Generator, prompt: str, show: bool = False) -> Generation:
    """One answer, streamed to the terminal if asked."""
    for piece in generator.stream(prompt, PARAMS):
        if show:
            print(piece.text, end="", flush=True)
        if piece.generation is not None:
            return piece.generation
    raise RuntimeError("a stream ended without its generation")


def tokens_per_second(answers: list[Generation]) -> float:
    """Decoding speed over all answers, prefill left out."""
    tokens = sum(one.statistics.new_tokens - 1 for one in answers)
    seconds = sum(one.statistics.draft_s + one.statistics.verify_s + one.statistics.host_s for one in answers)
    return tokens / seconds


def main() -> int:
    path = sys.argv[1]
    with Generator.open(path, mode="plain") as plain, Generator.open(path, mode="static") as speculative:
        prompt = sys.argv[2] if len(sys.argv) > 2 else PROMPT
        print(f"> {prompt}\n")
        answer(speculative, prompt, show=True)
        print("\n")
        plain_answers: list[Generation] = []
        speculative_answers: list[Generation] = []
        for compared in (prompt, *COMPARED):  # in turn, so that a busy machine slows both
            plain.reset()
            speculative.reset()
            plain_answers.append(answer(plain, compared))
            speculative_answers.append(answer(speculative, compared))
        rounds = sum(one.statistics.rounds for one in speculative_answers)
        accepted = sum(sum(one.statistics.accepted_lengths) for one in speculative_answers)
        same = all(a.token_ids == b.token_ids for a, b in zip(plain_answers, speculative_answers, strict=True))
        drafter = speculative.bundle.manifest.drafter.kind
    before, after = tokens_per_second(plain_answers), tokens_per_second(speculative_answers)
    print(f"plain decoding        {before:7.1f} tokens/s")
    print(f"speculative ({drafter}) {after:9.1f} tokens/s   {after / before:.2f}x")
    print(f"accepted length       {accepted / max(rounds, 1):7.2f} tokens a round")
    print(f"same tokens           {'yes' if same else 'NO'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
