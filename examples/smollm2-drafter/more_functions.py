"""More small functions to be completed, on other tasks than those of `conversations.py`.

python more_functions.py functions.jsonl aside.jsonl again.jsonl

Each is asked for twice, in other words and with other examples, which are computed here; the functions in
`aside.jsonl` are for the confidence head alone, and `again.jsonl` asks for all others in the words that are left. None
is of a benchmark.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

Input = Callable[[random.Random], tuple[Any, ...]]


class Function(NamedTuple):
    name: str
    parameters: str
    result: str
    text: str
    function: Callable[..., Any]
    inputs: Input


WORDS = [
    "river",
    "stone",
    "apple",
    "quiet",
    "orange",
    "window",
    "seven",
    "market",
    "paper",
    "blue",
    "garden",
    "letter",
    "coffee",
    "winter",
    "tower",
    "mirror",
]
LIST = "numbers: List[int]"


def numbers(source: random.Random) -> tuple[list[int]]:
    return ([source.randint(-5, 30) for _ in range(source.randint(3, 7))],)


def small_numbers(source: random.Random) -> tuple[list[int]]:
    return ([source.randint(1, 5) for _ in range(source.randint(4, 8))],)


def numbers_and(low: int, high: int) -> Input:
    return lambda source: (*numbers(source), source.randint(low, high))


def two_lists(source: random.Random) -> tuple[list[int], list[int]]:
    return (*small_numbers(source), *small_numbers(source))


def text(source: random.Random) -> tuple[str]:
    return (" ".join(source.sample(WORDS, source.randint(1, 4))),)


def text_and_number(source: random.Random) -> tuple[str, int]:
    return (*text(source), source.randint(1, 4))


def words(source: random.Random) -> tuple[list[str]]:
    return (source.sample(WORDS, source.randint(2, 5)),)


def integer(low: int, high: int) -> Input:
    return lambda source: (source.randint(low, high),)


def grid(source: random.Random) -> tuple[list[list[int]]]:
    width = source.randint(2, 3)
    return ([[source.randint(0, 9) for _ in range(width)] for _ in range(source.randint(2, 3))],)


def mapping(source: random.Random) -> tuple[dict[str, int]]:
    return ({word: source.randint(1, 20) for word in source.sample(WORDS, 3)},)


def pairs(source: random.Random) -> tuple[list[tuple[str, int]]]:
    return ([(word, source.randint(1, 20)) for word in source.sample(WORDS, 3)],)


FUNCTIONS = [
    Function(
        "running_totals", LIST, "List[int]", "the running totals of the list", lambda x: [*accumulate(x)], numbers
    ),
    Function("second_largest", LIST, "int", "the second largest element of the list", lambda x: sorted(x)[-2], numbers),
    Function(
        "differences",
        LIST,
        "List[int]",
        "the differences of neighbouring elements",
        lambda x: [b - a for a, b in pairwise(x)],
        numbers,
    ),
    Function(
        "rotate",
        f"{LIST}, k: int",
        "List[int]",
        "the list rotated to the left by k places",
        lambda x, k: x[k % len(x) :] + x[: k % len(x)],
        numbers_and(1, 4),
    ),
    Function(
        "above_mean",
        LIST,
        "List[int]",
        "all elements that are greater than the mean",
        lambda x: [n for n in x if n > sum(x) / len(x)],
        numbers,
    ),
    Function(
        "without_duplicates",
        LIST,
        "List[int]",
        "the list without repeated elements, in order of appearance",
        lambda x: [*dict.fromkeys(x)],
        small_numbers,
    ),
    Function(
        "most_frequent",
        LIST,
        "int",
        "the element that occurs most often, the smallest if there are several",
        lambda x: min(set(x), key=lambda n: (-x.count(n), n)),
        small_numbers,
    ),
    Function(
        "is_ascending",
        LIST,
        "bool",
        "whether every element is at least as large as the one before",
        lambda x: x == sorted(x),
        small_numbers,
    ),
    Function(
        "clamp_all",
        f"{LIST}, limit: int",
        "List[int]",
        "the list with every element above the limit replaced by it",
        lambda x, k: [min(n, k) for n in x],
        numbers_and(5, 15),
    ),
    Function(
        "chunks",
        f"{LIST}, size: int",
        "List[List[int]]",
        "the list cut into pieces of the given size",
        lambda x, k: [x[i : i + k] for i in range(0, len(x), k)],
        numbers_and(2, 3),
    ),
    Function(
        "common_elements",
        "first: List[int], second: List[int]",
        "List[int]",
        "the elements that are in both lists, in ascending order",
        lambda a, b: sorted({*a} & {*b}),
        two_lists,
    ),
    Function(
        "interleave",
        "first: List[int], second: List[int]",
        "List[int]",
        "the elements of both lists by turns, as long as both have any",
        lambda a, b: [n for pair in zip(a, b, strict=False) for n in pair],
        two_lists,
    ),
    Function(
        "dot_product",
        "first: List[int], second: List[int]",
        "int",
        "the sum of the products of elements at the same place",
        lambda a, b: sum(m * n for m, n in zip(a, b, strict=False)),
        two_lists,
    ),
    Function(
        "run_lengths",
        LIST,
        "List[List[int]]",
        "for each run of equal elements the element and how often it comes",
        lambda x: [[n, len([*group])] for n, group in groupby(x)],
        small_numbers,
    ),
    Function(
        "local_peaks",
        LIST,
        "List[int]",
        "the elements that are greater than both of their neighbours",
        lambda x: [b for a, b, c in zip(x, x[1:], x[2:], strict=False) if a < b > c],
        numbers,
    ),
    Function("index_of_smallest", LIST, "int", "the index of the smallest element", lambda x: x.index(min(x)), numbers),
    Function("sum_of_ends", LIST, "int", "the sum of the first and the last element", lambda x: x[0] + x[-1], numbers),
    Function(
        "zeros_last",
        LIST,
        "List[int]",
        "the list with all zeros moved to its end, the others in their order",
        lambda x: [n for n in x if n] + [n for n in x if not n],
        lambda source: ([source.choice((0, 0, 1, 2, 3, 7)) for _ in range(6)],),
    ),
    Function(
        "count_pairs",
        f"{LIST}, total: int",
        "int",
        "how many pairs of elements add up to the total",
        lambda x, k: sum(x[i] + x[j] == k for j in range(len(x)) for i in range(j)),
        lambda source: (*small_numbers(source), source.randint(4, 8)),
    ),
    Function(
        "range_of_values",
        LIST,
        "int",
        "the difference between the largest and the smallest element",
        lambda x: max(x) - min(x),
        numbers,
    ),
    Function(
        "capitalize_words",
        "text: str",
        "str",
        "the text with the first letter of each word in upper case",
        lambda t: t.title(),
        text,
    ),
    Function(
        "initials",
        "text: str",
        "str",
        "the initials of the words, in upper case, each followed by a full stop",
        lambda t: "".join(f"{w[0].upper()}." for w in t.split()),
        text,
    ),
    Function(
        "longest_words_first",
        "words: List[str]",
        "List[str]",
        "the words sorted by length, the longest first",
        lambda w: sorted(w, key=len, reverse=True),
        words,
    ),
    Function(
        "total_length",
        "words: List[str]",
        "int",
        "the number of letters in all words together",
        lambda w: sum(map(len, w)),
        words,
    ),
    Function(
        "words_with",
        "words: List[str], letter: str",
        "List[str]",
        "the words that contain the letter",
        lambda w, c: [one for one in w if c in one],
        lambda source: (*words(source), source.choice("aeotr")),
    ),
    Function(
        "group_by_length",
        "words: List[str]",
        "Dict[int, List[str]]",
        "a dictionary from lengths to the words of it",
        lambda w: {k: [one for one in w if len(one) == k] for k in sorted({*map(len, w)})},
        words,
    ),
    Function(
        "shift_letters",
        "text: str, k: int",
        "str",
        "the text with each lower-case letter moved k places on",
        lambda t, k: "".join(chr((ord(c) - 97 + k) % 26 + 97) if c.islower() else c for c in t),
        text_and_number,
    ),
    Function(
        "repeat_text",
        "text: str, times: int",
        "str",
        "the text repeated, with a hyphen between repetitions",
        lambda t, k: "-".join([t] * k),
        text_and_number,
    ),
    Function(
        "snake_case",
        "text: str",
        "str",
        "the words of the text joined by underscores",
        lambda t: t.replace(" ", "_"),
        text,
    ),
    Function(
        "count_letter",
        "text: str, letter: str",
        "int",
        "how often the letter occurs in the text",
        lambda t, c: t.count(c),
        lambda source: (*text(source), source.choice("aeotr")),
    ),
    Function(
        "consonants",
        "text: str",
        "List[str]",
        "the distinct consonants of the text in alphabetical order",
        lambda t: sorted({c for c in t if c.isalpha() and c not in "aeiou"}),
        text,
    ),
    Function(
        "truncate",
        "text: str, length: int",
        "str",
        "the first characters of the text, and three dots if any are cut off",
        lambda t, k: t if len(t) <= k else t[:k] + "...",
        text_and_number,
    ),
    Function(
        "alternate_case",
        "text: str",
        "str",
        "the text with upper-case and lower-case characters by turns",
        lambda t: "".join(c.upper() if i % 2 == 0 else c.lower() for i, c in enumerate(t)),
        text,
    ),
    Function(
        "common_prefix_length",
        "first: str, second: str",
        "int",
        "how many characters both texts begin with",
        lambda a, b: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))),
        lambda source: (word := source.choice(WORDS), word[: source.randint(1, 4)] + source.choice(WORDS)),
    ),
    Function(
        "digit_sum", "n: int", "int", "the sum of the digits of n", lambda n: sum(map(int, str(n))), integer(10, 9999)
    ),
    Function(
        "collatz_steps",
        "n: int",
        "int",
        "how many steps it takes to reach 1, halving even numbers and replacing odd ones by 3n + 1",
        lambda n: len([*_collatz(n)]) - 1,
        integer(3, 30),
    ),
    Function(
        "divisors",
        "n: int",
        "List[int]",
        "all divisors of n in ascending order",
        lambda n: [d for d in range(1, n + 1) if n % d == 0],
        integer(6, 60),
    ),
    Function(
        "triangular",
        "n: int",
        "int",
        "the sum of the first n positive integers",
        lambda n: n * (n + 1) // 2,
        integer(3, 40),
    ),
    Function("to_binary", "n: int", "str", "n in binary, without a prefix", lambda n: f"{n:b}", integer(3, 99)),
    Function(
        "reverse_digits",
        "n: int",
        "int",
        "n with its digits in reverse order",
        lambda n: int(str(n)[::-1]),
        integer(12, 9999),
    ),
    Function(
        "is_leap_year",
        "year: int",
        "bool",
        "whether the year is a leap year",
        lambda y: y % 4 == 0 and (y % 100 != 0 or y % 400 == 0),
        integer(1890, 2030),
    ),
    Function(
        "minutes_to_clock",
        "minutes: int",
        "str",
        "the time of the day after so many minutes since midnight, as HH:MM",
        lambda m: f"{m // 60 % 24:02d}:{m % 60:02d}",
        integer(5, 1430),
    ),
    Function(
        "multiplication_table",
        "n: int",
        "List[List[int]]",
        "the products of the numbers from 1 to n",
        lambda n: [[a * b for b in range(1, n + 1)] for a in range(1, n + 1)],
        integer(2, 4),
    ),
    Function(
        "count_down",
        "n: int",
        "List[int]",
        "the numbers from n down to 0",
        lambda n: [*range(n, -1, -1)],
        integer(2, 8),
    ),
    Function(
        "row_sums", "grid: List[List[int]]", "List[int]", "the sum of each row", lambda g: [sum(r) for r in g], grid
    ),
    Function(
        "transpose",
        "grid: List[List[int]]",
        "List[List[int]]",
        "the grid with rows and columns exchanged",
        lambda g: [list(column) for column in zip(*g, strict=False)],
        grid,
    ),
    Function(
        "flatten",
        "grid: List[List[int]]",
        "List[int]",
        "all elements, row after row",
        lambda g: [n for row in g for n in row],
        grid,
    ),
    Function(
        "largest_in_grid",
        "grid: List[List[int]]",
        "int",
        "the largest element of all rows",
        lambda g: max(map(max, g)),
        grid,
    ),
    Function(
        "main_diagonal",
        "grid: List[List[int]]",
        "List[int]",
        "the elements whose row and column have the same index",
        lambda g: [g[i][i] for i in range(min(len(g), len(g[0])))],
        grid,
    ),
    Function(
        "column",
        "grid: List[List[int]], index: int",
        "List[int]",
        "the elements of one column, from the top",
        lambda g, i: [row[i] for row in g],
        lambda source: (*grid(source), source.randint(0, 1)),
    ),
    Function(
        "invert",
        "prices: Dict[str, int]",
        "Dict[int, str]",
        "a dictionary from the values to their keys",
        lambda d: {v: k for k, v in d.items()},
        mapping,
    ),
    Function(
        "cheapest",
        "prices: Dict[str, int]",
        "str",
        "the key with the smallest value",
        lambda d: min(d, key=d.get),
        mapping,
    ),
    Function(
        "total_price", "prices: Dict[str, int]", "int", "the sum of all values", lambda d: sum(d.values()), mapping
    ),
    Function(
        "above",
        "prices: Dict[str, int], limit: int",
        "List[str]",
        "the keys whose value is greater than the limit",
        lambda d, k: [key for key, value in d.items() if value > k],
        lambda source: (*mapping(source), source.randint(5, 12)),
    ),
    Function(
        "sort_by_score",
        "results: List[Tuple[str, int]]",
        "List[Tuple[str, int]]",
        "the pairs sorted by their second part, the highest first",
        lambda p: sorted(p, key=lambda one: -one[1]),
        pairs,
    ),
    Function(
        "names_only",
        "results: List[Tuple[str, int]]",
        "List[str]",
        "the first part of each pair, in alphabetical order",
        lambda p: sorted(name for name, _ in p),
        pairs,
    ),
]
PHRASES = ("Return {}", "Write this function so that it returns {}", "Compute {}", "You are asked for {}")
ASIDE = 18  # functions


def _collatz(n: int) -> list[int]:
    chain = [n]
    while chain[-1] != 1:
        chain.append(chain[-1] // 2 if chain[-1] % 2 == 0 else 3 * chain[-1] + 1)
    return chain


def stub(function: Function, phrase: str, source: random.Random) -> str:
    """The prompt: a signature, and a docstring with examples."""
    types = [name for name in ("Dict", "List", "Tuple") if f"{name}[" in function.parameters + function.result]
    header = f"from typing import {', '.join(types)}\n\n" if types else ""
    lines = []
    as_doctest = source.random() < 0.5
    for _ in range(source.randint(1, 3)):
        given = function.inputs(source)
        call = f"{function.name}({', '.join(map(repr, given))})"
        expected = repr(function.function(*given))
        lines.append(f"    >>> {call}\n    {expected}" if as_doctest else f"    {call} should return {expected}")
    shown = "\n".join(lines)
    return (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f"```python\n{header}\ndef {function.name}({function.parameters}) -> {function.result}:\n"
        f'    """{phrase.format(function.text)}.\n\n{shown}\n    """\n\n```'
    )


def main() -> None:
    source = random.Random(7)
    functions = source.sample(FUNCTIONS, len(FUNCTIONS))
    first, aside, again = map(Path, sys.argv[1:])
    left: list[tuple[Function, str]] = []
    for path, chosen in ((first, functions[ASIDE:]), (aside, functions[:ASIDE])):
        prompts = []
        for one in chosen:
            phrases = source.sample(PHRASES, 2)
            prompts += [stub(one, phrase, source) for phrase in phrases]
            left += [(one, phrase) for phrase in PHRASES if phrase not in phrases and path == first]
        write(path, prompts, source)
    write(again, [stub(one, phrase, source) for one, phrase in left], source)


def write(path: Path, prompts: list[str], source: random.Random) -> None:
    source.shuffle(prompts)
    lines = [json.dumps({"domain": "code", "turns": [prompt]}) + "\n" for prompt in prompts]
    path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
