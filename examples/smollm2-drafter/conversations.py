"""Conversations of two turns, and small functions to be completed: kinds that other sources of prompts have few of.

python conversations.py conversations.jsonl functions.jsonl

Both are put together from parts by a seeded generator. The conversations follow the eight kinds that assistants are
commonly compared on (writing, roleplay, reasoning, arithmetic, coding, extraction, science, humanities); none of them
is a question of a benchmark. The functions have examples in their docstrings, which are computed here.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLACES = """
the Scottish Highlands|Lisbon|a mountain village in Nepal|the Norwegian coast|Mexico City|a night market in Taipei
the lakes of Finland|Istanbul|a vineyard in Tuscany|the Australian outback|Cape Town|Buenos Aires|a small Greek island
the Sahara|Vancouver|Kyoto in autumn|the Irish countryside|New Orleans|Marrakesh|the Swiss Alps
"""
PRODUCTS = """
an electric bicycle|a noise-cancelling headset|a reusable coffee cup|a language-learning app|a garden robot
a standing desk|a solar charger|a meal-planning service|a smart thermostat|a folding kayak|a child's telescope
a budgeting app|a waterproof backpack|a bread machine|an indoor herb garden|a fitness watch
"""
OCCASIONS = """
ask a landlord to repair the heating|thank a teacher who changed your life|apologise to a customer for a late delivery
invite colleagues to a picnic|resign from a job on good terms|ask a professor to extend a deadline
welcome a new neighbour|complain politely about a noisy restaurant|ask your manager for a day off
congratulate a friend on a new baby|request feedback on a draft report|recommend a former student for a job
announce a change of meeting time|ask a company to sponsor a school event|decline an invitation kindly
"""
TALES = """
a lighthouse keeper who finds a message in a bottle|a clockmaker who can stop time
two rival bakers who must share a shop
a robot that learns to paint|a girl who talks to the wind|a detective who is afraid of the dark|a lost dog on a train
an astronaut who hears music on Mars|a librarian who discovers a hidden room|a dragon who is tired of gold
a violin that remembers its owners|a boy who sells dreams|a ghost who wants to learn to cook|the last tree in a city
a gardener who grows stars|a pilot who lands in the wrong century
"""
CHARACTERS = """
a medieval knight|a grumpy old sailor|a famous chef who hates sugar|a friendly alien on its first visit to Earth
a detective in the 1920s|a wise owl|a time traveller from the year 2300|a pirate captain|a tired superhero
a strict piano teacher|an enthusiastic tour guide|a philosopher in ancient Athens|a sports commentator
a talking cat|a mountain guide|a museum guard who loves history|an inventor in Victorian London|a weather presenter
"""
ASKED = """
What do you eat for breakfast?|What do you think of smartphones?|How do you spend a rainy day?
What is the most important lesson you have learned?|Tell me about your worst day at work.|What makes you laugh?
What advice would you give to a young person?|How would you explain the internet?|What are you afraid of?
Describe the place where you live.|What would you do with a million dollars?|What do you think of modern art?
"""
SCIENCE = """
photosynthesis|how vaccines work|plate tectonics|the greenhouse effect|how a battery stores energy|black holes
natural selection|how DNA is copied|the water cycle|why the sky is blue|superconductors|how the human heart works
the difference between fission and fusion|how lenses form images|what enzymes do|the structure of an atom
how earthquakes are measured|radioactive decay|how bridges carry loads|why ice floats|how the immune system learns
the life cycle of a star|catalysts|how sound travels|osmosis|how a transistor works|antibiotic resistance
the carbon cycle|gravity and orbits|how memory works in the brain
how GPS finds a position|the second law of thermodynamics
"""
HUMANITIES = """
the causes of the First World War|the role of women in the Industrial Revolution|the fall of the Roman Empire
the influence of the printing press|supply and demand|the Silk Road|the ethics of artificial intelligence
the Renaissance|stoicism|the effects of inflation on households|the French Revolution|the history of jazz
colonialism in Africa|the theory of the social contract|the Great Depression|the importance of free speech
impressionist painting|the Cold War|globalisation and local cultures|utilitarianism|the moon landing in society
the spread of Buddhism|public transport in cities|the myth of Prometheus|unemployment and its kinds|the Magna Carta
"""
SUBJECTS = """
remote work|school uniforms|learning a second language|eating less meat|reading on paper or on a screen
owning a pet|nuclear power|social media for teenagers|living in a big city|zoos|electric cars|homework
a four-day working week|tourism|space exploration|artificial intelligence in schools|public libraries|daily exercise
getting enough sleep|managing stress|time management|saving money|online shopping|volunteering|teamwork
"""
TASKS = """
counts how often each word occurs in a text|checks whether a string is a palindrome|merges two sorted lists
finds the second largest number in a list|reverses a linked list|converts Roman numerals to integers
removes duplicates from a list but keeps its order|computes the n-th Fibonacci number|validates an email address
finds all prime numbers below n|rotates a matrix by 90 degrees|reads a CSV file and sums a column
finds the longest common prefix of some strings|implements a stack with two queues|sorts a dictionary by its values
checks whether brackets are balanced|computes the edit distance of two words|flattens a nested list
finds the missing number in a list of 1 to n|generates all permutations of a string|simulates a simple bank account
converts temperatures between Celsius and Fahrenheit|draws a triangle of stars|finds the shortest path in a maze
implements binary search|counts the islands in a grid|computes compound interest|schedules meetings without overlap
"""
LANGUAGES = "Python|Python|Python|JavaScript|C++|Java|SQL and Python|Go"
NAMES = "Maria|Tom|Aisha|Kenji|Lena|Omar|Priya|Sven|Chloe|Diego|Ruth|Ivan"
WORDS = "reviews of a cafe|reports of a football match|notes of a doctor|announcements of a school|product descriptions"

FOLLOW_UPS = {
    "writing": """
Rewrite your answer in a more formal tone.|Make it shorter, at most three sentences.|Now rewrite it as a poem.
Add a surprising ending.|Rewrite it for an audience of children.|Give it a title and explain your choice.
Rewrite it from another point of view.|Turn it into a dialogue between two people.|List the main points as bullets.
Translate the mood into something humorous.|Replace every adjective with a stronger one.|Write a reply to it.
""",
    "roleplay": """
Answer again, but this time you are in a hurry.|What would your best friend say about that?|Do you ever regret it?
How did you become who you are?|Tell me a secret.|What would you ask me, if you could ask one question?
Say the same in one sentence.|Why do you think so?|What will you do tomorrow?|Sing a short song about it.
""",
    "reasoning": """
What if the numbers were doubled?|Explain your reasoning step by step.|Is there another possible answer?
What information would make the answer certain?|Explain it to a ten-year-old.|Check your answer once more.
Now answer in one sentence.|Make up a similar question and answer it.
""",
    "coding": """
Explain how it works, line by line.|What is its time complexity?|Add error handling.|Write tests for it.
Can you make it faster?|Rewrite it without using any library.|Now do the same in another programming language.
Add comments and a docstring.|What happens with empty input?|Rewrite it recursively.
""",
    "explaining": """
Explain it to a five-year-old.|Give a concrete example from everyday life.|What are common misconceptions about it?
Summarise your answer in two sentences.|Why does it matter today?|What are the limits of this explanation?
Compare it with something similar.|Make a list of five key terms with short definitions.|Write a short quiz about it.
What questions remain open?|How could a teacher present this in class?|Argue for the opposite view.
""",
    "extraction": """
Now give the result as JSON.|Sort them by alphabet.|Which of them is the most important, and why?
Do the same, but only for the first two.|Count them.|Present it as a table in CSV format.
""",
}
CONVERSATIONS = {"writing": 130, "roleplay": 70, "reasoning": 80, "coding": 70, "explaining": 180, "extraction": 50}


def parts(text: str) -> list[str]:
    return [part.strip() for part in text.strip().replace("\n", "|").split("|") if part.strip()]


def distinct(pick: Callable[[str], str], text: str, count: int) -> list[str]:
    found: list[str] = []
    while len(found) < count:
        if (one := pick(text)) not in found:
            found.append(one)
    return found


def writing(pick: Callable[[str], str]) -> str:
    return pick(
        f"Write a short travel article about {pick(PLACES)}, with food, people and one thing that went wrong."
        f"|Write a professional email to {pick(OCCASIONS)}."
        f"|Write a letter to {pick(OCCASIONS)}. Keep it under 150 words."
        f"|Write a short story about {pick(TALES)}."
        f"|Begin a story about {pick(TALES)} with a gripping first paragraph."
        f"|Write an advertisement for {pick(PRODUCTS)}."
        f"|Draft an outline of a blog post about {pick(SUBJECTS)}, with subheadings."
        f"|Write a persuasive speech about {pick(SUBJECTS)}."
        f"|Describe {pick(PLACES)} at dawn, using all five senses."
        f"|Compare {pick(PRODUCTS)} and {pick(PRODUCTS)} as gifts for a friend."
    )


def roleplay(pick: Callable[[str], str]) -> str:
    character, question = pick(CHARACTERS), pick(ASKED)
    return pick(
        f"Pretend that you are {character} and stay in this role for the whole conversation. {question}"
        f"|You are {character}. Answer as this character would. {question}"
        f"|Act as {character} who gives advice on {pick(SUBJECTS)}. How should I begin?"
        f"|Imagine you are {character}. Describe a typical day in {pick(PLACES)}."
    )


def reasoning(pick: Callable[[str], str]) -> str:
    one, two, three = distinct(pick, NAMES, 3)
    number = pick("3|4|5|6|8|12")
    other = pick("2|7|9|10|15|20")
    return pick(
        f"{one} is older than {two}, and {two} is older than {three}. Who is the youngest?"
        f"|A train leaves at {number} o'clock and arrives {other} hours later. At what time does it arrive?"
        f"|A shop sells pens in packs of {number}. How many packs does {one} need for {other} classes of 30 "
        "pupils each?"
        f"|{one} has {other} red and {number} blue marbles. What is the probability of drawing a blue one?"
        f"|If all roses are flowers and some flowers fade quickly, do some roses fade quickly? Explain."
        f"|{one} stands north of {two} and looks south. Is {two} in front of or behind {one}?"
        f"|Which word does not belong with the others: apple, {pick('pear|plum|cherry')}, carrot, grape? Why?"
        f"|The sides of a rectangle are {number} and {other} metres. Find its area and its perimeter."
        f"|Solve for x: {number}x + {other} = {pick('23|31|47|52|64')}."
        f"|A recipe for {number} people needs {other} eggs. How many eggs are needed for 24 people?"
        f"|A tank is filled by one pipe in {number} hours and by another in {other} hours. How long do both take "
        "together?"
    )


def coding(pick: Callable[[str], str]) -> str:
    language, task = pick(LANGUAGES), pick(TASKS)
    return pick(
        f"Write a {language} program that {task}."
        f"|Write a function in {language} that {task}."
        f"|Implement a function that {task} in {language}, and explain it."
        f"|How would you design a program that {task}?"
    )


def explaining(pick: Callable[[str], str]) -> str:
    science, humanities, subject = pick(SCIENCE), pick(HUMANITIES), pick(SUBJECTS)
    return pick(
        f"Explain {science} in simple terms.|What is important to know about {science}?"
        f"|Describe {science} and give an example.|Why is it useful to understand {science}?"
        f"|Discuss {humanities} and its consequences.|Give an overview of {humanities}."
        f"|What can we learn from {humanities}?|Explain the significance of {humanities} to a visitor of a museum."
        f"|What are the advantages and disadvantages of {subject}?|Give five tips about {subject}."
        f"|What would you tell a friend who asks about {subject}?|How has {subject} changed over the last decades?"
    )


def extraction(pick: Callable[[str], str]) -> str:
    first, second, third = distinct(pick, NAMES, 3)
    place, product, other = pick(PLACES), pick(PRODUCTS), pick(PRODUCTS)
    return pick(
        f"Extract all names from this text: {first} met {second} in {place}. Later {third} joined them and bought "
        f"{product}."
        f"|Here are three {pick(WORDS)}. Rate each from 1 to 5. a) {first} loved it and will come back. b) It was "
        f"fine, says {second}. c) {third} was very disappointed."
        f"|List the products and their prices: {product} costs ${pick('19|45|120|300')}, {other} costs "
        f"${pick('25|60|99|250')}."
        f"|Who did what? {first} wrote the report, {second} checked it, and {third} sent it from {place}. Answer as a "
        "list."
        f"|Summarise in one sentence: {first} wanted to travel to {place}, but {second} preferred to stay at home, so "
        f"they bought {product} instead and {third} was happy about it."
    )


MAKERS: dict[str, Callable[[Callable[[str], str]], str]] = {
    "writing": writing,
    "roleplay": roleplay,
    "reasoning": reasoning,
    "coding": coding,
    "explaining": explaining,
    "extraction": extraction,
}


def conversations(random_source: random.Random) -> list[list[str]]:
    """Two turns each; no two open alike."""
    found: dict[str, list[str]] = {}

    def pick(text: str) -> str:
        return random_source.choice(parts(text))

    for kind, count in CONVERSATIONS.items():
        enough = len(found) + count
        while len(found) < enough:
            opening = MAKERS[kind](pick)
            opening = opening[0].upper() + opening[1:]
            found.setdefault(opening, [opening, pick(FOLLOW_UPS[kind])])
    return list(found.values())


# (what the name says, what the docstring says, the test)
NUMBER_FILTERS: list[tuple[str, str, Callable[[int], bool]]] = [
    ("even", "even numbers", lambda n: n % 2 == 0),
    ("odd", "odd numbers", lambda n: n % 2 == 1),
    ("positive", "positive numbers", lambda n: n > 0),
    ("negative", "negative numbers", lambda n: n < 0),
    ("prime", "prime numbers", lambda n: n > 1 and all(n % d for d in range(2, n))),
    ("two_digit", "numbers with exactly two digits", lambda n: 10 <= abs(n) <= 99),
    ("square", "perfect squares", lambda n: n >= 0 and round(n**0.5) ** 2 == n),
    ("multiple_of_three", "multiples of three", lambda n: n % 3 == 0),
]
NUMBER_RESULTS: list[tuple[str, str, str, Callable[[list[int]], Any]]] = [
    ("sum", "int", "the sum of the {} in a list of integers", sum),
    ("count", "int", "how many {} there are in the list", len),
    ("largest", "int", "the largest of the {} in the list. Return 0 if there are none", lambda x: max(x, default=0)),
    ("filter", "List[int]", "a list of only the {} of the given list, in their order", list),
    ("sorted", "List[int]", "the {} of the list in ascending order, without duplicates", lambda x: sorted(set(x))),
    ("squares", "List[int]", "a list with the squares of all {} in the list", lambda x: [n * n for n in x]),
]
TEXTS = ["hello world", "Programming", "a man a plan", "Data Science 101", "banana", "Python is fun", "xyz", "level"]
TEXT_FUNCTIONS: list[tuple[str, str, str, Callable[[str], Any]]] = [
    ("count_vowels", "int", "the number of vowels in the text", lambda t: sum(c in "aeiouAEIOU" for c in t)),
    ("reverse_words", "str", "the text with its words in reverse order", lambda t: " ".join(t.split()[::-1])),
    ("remove_spaces", "str", "the text without its spaces", lambda t: t.replace(" ", "")),
    ("longest_word", "str", "the longest word. If there are several, the first", lambda t: max(t.split(), key=len)),
    ("capitals", "str", "only the upper-case letters of the text", lambda t: "".join(c for c in t if c.isupper())),
    ("word_lengths", "List[int]", "the length of each word in the text", lambda t: [len(w) for w in t.split()]),
    ("first_letters", "str", "the first letter of each word", lambda t: "".join(w[0] for w in t.split())),
    ("is_palindrome", "bool", "whether the text reads the same backwards", lambda t: t == t[::-1]),
    ("swap_case", "str", "the text with the case of every letter swapped", str.swapcase),
    (
        "unique_characters",
        "int",
        "how many distinct characters there are, regardless of case",
        lambda t: len({*t.lower()}),
    ),
    ("every_second", "str", "every second character of the text, from the first on", lambda t: t[::2]),
    ("count_words", "int", "the number of words in the text", lambda t: len(t.split())),
    ("has_digit", "bool", "True if the text has at least one digit", lambda t: any(c.isdigit() for c in t)),
    ("double_letters", "str", "the text with every character doubled", lambda t: "".join(c * 2 for c in t)),
    ("without_vowels", "str", "the text without vowels", lambda t: "".join(c for c in t if c not in "aeiouAEIOU")),
    (
        "character_counts",
        "dict",
        "a dictionary of how often each letter occurs",
        lambda t: {c: t.count(c) for c in t if c.isalpha()},
    ),
]
PAIR_FUNCTIONS: list[tuple[str, str, str, Callable[[int, int], Any]]] = [
    (
        "common_divisor",
        "int",
        "the greatest common divisor of a and b",
        lambda a, b: next(d for d in range(min(a, b), 0, -1) if a % d == b % d == 0),
    ),
    ("last_digits_equal", "bool", "True if a and b end in the same digit", lambda a, b: a % 10 == b % 10),
    ("sum_between", "int", "the sum of all integers from a to b, both included", lambda a, b: sum(range(a, b + 1))),
    ("multiples", "List[int]", "the first b multiples of a", lambda a, b: [a * k for k in range(1, b + 1)]),
    ("power_without_operator", "int", "a to the power of b, without using **", lambda a, b: a**b),
    (
        "digits_in_common",
        "List[int]",
        "the digits that occur in both numbers, ascending",
        lambda a, b: sorted({int(c) for c in str(a)} & {int(c) for c in str(b)}),
    ),
    ("divisible", "bool", "True if a is divisible by b", lambda a, b: a % b == 0),
    (
        "to_base",
        "str",
        "the number a written in base b, as a string",
        lambda a, b: "".join(str(a // b**k % b) for k in range(9, -1, -1)).lstrip("0"),
    ),
]


def stub(name: str, parameters: str, result: str, text: str, examples: list[tuple[str, Any]], doctest: bool) -> str:
    header = "from typing import List\n\n" if "List[" in parameters + result else ""
    if doctest:
        shown = "\n".join(f"    >>> {name}({given})\n    {expected!r}" for given, expected in examples)
    else:
        shown = "\n".join(f"    {name}({given}) ➞ {expected!r}" for given, expected in examples)
    return (
        "Write a solution to the following problem and make sure that it passes the tests:\n"
        f'```python\n{header}\ndef {name}({parameters}) -> {result}:\n    """ {text}.\n{shown}\n    """\n\n```'
    )


def functions(random_source: random.Random) -> list[str]:
    found = []
    for (kind, words, test), (verb, result, text, function) in itertools.product(NUMBER_FILTERS, NUMBER_RESULTS):
        lists = [[random_source.randint(-9, 60) for _ in range(random_source.randint(3, 6))] for _ in range(2)]
        examples = [(repr(numbers), function([n for n in numbers if test(n)])) for numbers in lists]
        said = random_source.choice(("Return ", "Given a list of integers, return ", "Your task is to return "))
        doctest = random_source.random() < 0.6
        found.append(stub(f"{verb}_{kind}", "numbers: List[int]", result, said + text.format(words), examples, doctest))
    for name, result, text, textual in TEXT_FUNCTIONS:
        for said in ("Return ", "Given a text, return "):
            texts = random_source.sample(TEXTS, 2)
            examples = [(repr(given), textual(given)) for given in texts]
            found.append(stub(name, "text: str", result, said + text, examples, random_source.random() < 0.6))
    for name, result, text, binary in PAIR_FUNCTIONS:
        for said in ("Return ", "You are given two positive integers a and b. Return "):
            pairs = [(random_source.randint(2, 30), random_source.randint(2, 5)) for _ in range(2)]
            examples = [(f"{a}, {b}", binary(a, b)) for a, b in pairs]
            found.append(stub(name, "a: int, b: int", result, said + text, examples, random_source.random() < 0.6))
    return found


def main() -> None:
    source = random.Random(5)
    for path, domain, prompts in (
        (Path(sys.argv[1]), "chat", conversations(source)),
        (Path(sys.argv[2]), "code", [[text] for text in functions(source)]),
    ):
        source.shuffle(prompts)
        lines = [json.dumps({"domain": domain, "turns": turns}) + "\n" for turns in prompts]
        path.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
