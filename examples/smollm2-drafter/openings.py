"""How users begin, for the target to go on: thousands of prompts that nobody wrote.

python openings.py openings.jsonl

`dspark-edge respond --synthesise N --openings openings.jsonl` lets the target end each of these, and answers what comes
out. Left to itself the target asks what it was trained on most, and hardly ever for a function in HumanEval's form; so
half of these begin such a one, by verb and noun, a fifth a problem with numbers, and the rest any request.
"""

from __future__ import annotations

import json
import random
import sys
from itertools import product
from pathlib import Path

TASK = "Write a solution to the following problem and make sure that it passes the tests:\n```python\n\n"
TYPED = "from typing import List\n\n\n"
PARAMETERS = """
n|n: int|x, y|a, b|a, b, c|a: int, b: int|s|s: str|text|text: str|string|string: str|lst|l: list|arr|array|nums|numbers|
numbers: List[int]|numbers: List[float]|strings: List[str]|words|words: List[str]|lst, k|arr, k|n, k|nums, target|
s, n|d|dictionary|grid|matrix|x: int, base: int|string: str, substring: str|l1, l2|a: str, b: str|xs: list|txt|N
""".replace("\n", "").split("|")
DOCSTRINGS = """
|Given|Given a list of|Given a string|Given a positive integer|Given an array of|Given two|Return|Return the|Return true if|
Return a list of|Return only|Returns|You are given|You are given a list|You're given|Write a function that|
Write a function which takes|Create a function that|Create a function which|Implement a function that|Your task is|
This function takes|For a given|Find the|Check if|Check whether|Count the|Calculate|Filter an input list of|
From a given|In this problem,|Input to this function is|sum|A|The|It|Sort|Find how many times|Task|I have|
""".replace("\n", "").split("|")
TAKEN = {
    "add_elements",
    "fix_spaces",
    "flip_case",
    "is_palindrome",
    "make_palindrome",
    "smallest_change",
    "sort_array",
    "sort_numbers",
}
"""Names of HumanEval's own functions."""

VERBS = """
add all any append apply are average build calculate can change check choose clean closest collect combine common
compare compute concatenate convert count create decode decrypt delete derive digits distance divide double draw drop
encode encrypt evaluate even extract factor fill filter find first fix flatten flip format from generate get group has
insert intersect is join keep largest last length list longest make map match max mean median merge min minimum move
multiply next normalize nth number odd order pad pairs parse partition permute pick pluck power prime product range rank
rearrange remove rename repeat replace rescale reverse rotate round sample scale search second select separate shift
shortest shuffle simplify skip smallest sort split square starts strip strange string sum swap to total transform trim
truncate union unique update valid validate words zip
""".split()
NOUNS = """
age angle anagram area array array_sum average balance binary board book box bracket brackets bytes calendar capital
case cell change character characters circle city cipher code coins color column common_elements consonants cost counts
cube cubes currency cycle date dates day decimal depth dictionary difference digit digits divisor divisors duplicates
edges element elements equation even_numbers exchange exponent expression factorial factors fibonacci file_name files
fraction frequency fruit game gcd grade grades graph grid hex histogram hours index indices integer integers intersection
interval intervals items json key keys largest_divisor letter letters line list lists log lowercase matrix maximum
median message minutes missing_number mode money month multiples name names negatives nested_list neighbors number
numbers odd_digits order pair pairs palindrome parentheses password path percent perimeter permutation plane planets
points polynomial position positives power prefix prefixes price prime primes product profit pyramid quadrant queue
radius random range record rectangle remainder roman root row rows score scores sequence series set shape shopping_list
sign signs size slots song sorted_list spaces speed square squares stack step steps string strings student students
subarray subsequence substring substrings suffix sum table tax temperature text threshold time title total tree triangle
triples tuple tuples unit_price value values vector vocabulary volume vowels weight weights word words year zeros
""".split()
SUMS = """
A|An|The|There are|If|In|At|On|Every|Each|After|Before|During|Two|Three|Four|Ten|A box|A store|A bakery|A farmer|A
train|A school|A class|A company|A recipe|A car|A bag of|A pack of|Sarah|John|Tom|Maria|James|Emma|Mike|Lisa|David|Anna|
Carlos|Jenny|Peter|Kate|Sam|Lucy|Alex|Nina|Ben|Grace|Mr. Smith|Mrs. Jones|The cost of|The price of|The total|The sum of|
Half of|One third of|20% of|A quarter of|Last week,|Last year,|On Monday,|This month,|Yesterday,|It takes|It costs|How
many|How much|What is|Find the|Solve|Calculate|Jack and|Tim and|Rachel and|Three friends|A group of|A family|A teacher|A
shop|A restaurant|A garden|A pool|A tank|A rectangle|A team|A bus|A library|Olivia|Noah|Liam|Mia|Ethan|Zoe|Ryan|Ella
""".replace("\n", " ").split("|")
REQUESTS = """
Write|Write a|Write a short|Compose|Compose a|Draft|Draft a|Describe|Describe a|Explain|Explain how|Explain why|Explain
the|Explain to a child|Imagine|Imagine you are|Imagine that|Suppose|Suppose you|Act as|Act as a|Pretend|Pretend to be|You
are a|Embrace the role of|Take the role of|Please|Please take on the role of|Can you|Can you explain|Could you|Could you
write|What|What is|What are|What are the|What would|What happens|Which|Why|Why do|Why is|How|How do|How can I|How would|How
does|When|Where|Who|Is|Is it|Are|Do|Does|Should|Should I|Give|Give me|Give an example|List|List the|List five|Name|Create|
Create a|Design|Design a|Develop|Outline|Outline a|Plan|Plan a|Suggest|Recommend|Compare|Compare and contrast|Discuss|
Discuss the|Analyze|Analyze the|Evaluate|Evaluate the following|Summarize|Summarize the|Rewrite|Rephrase|Edit|Correct|
Translate|Identify|Identify the|Classify|Extract|Read the following|Given|Given the following|Given that|Here is|Below is|
In|In a|In the|For|If|If you|Tell me|Tell me a|Help|Help me|I|I am|I'm|I want|I need|I have|My|Let's|Let us|The|The city of|
A|Consider|Consider the|Provide|Provide a|Determine|Prove|Solve|Implement|Implement a|Write a function|Write a Python
program|Write a C++ program|Which of|Think of|Picture|Craft|Craft a|Generate|Make|Make a|Hi|Hello|Do you|Have you
""".replace("\n", " ").split("|")


def main() -> None:
    random_order = random.Random(5)
    functions = [name for verb, noun in product(VERBS, NOUNS) if (name := f"{verb}_{noun}") not in TAKEN]
    random_order.shuffle(functions)
    lines = []
    for number, name in enumerate(functions):
        parameters = random_order.choice(PARAMETERS)
        head = f"{TYPED if 'List' in parameters else ''}def {name}({parameters}):"
        lines.append(("code", f'{TASK}{head}\n    """{random_order.choice(DOCSTRINGS)}'))
        if number % 5 < 2:
            lines.append(("math", SUMS[(number // 5 * 2 + number % 5) % len(SUMS)].strip()))
        if number % 5 < 3:
            request = "" if number % 10 < 3 else REQUESTS[(number // 5 * 3 + number % 5) % len(REQUESTS)].strip()
            lines.append(("chat", request))
    text = "".join(json.dumps({"domain": domain, "turns": [words]}) + "\n" for domain, words in lines)
    Path(sys.argv[1]).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
