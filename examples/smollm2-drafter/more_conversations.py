"""Many more conversations of two turns, on other subjects than those of `conversations.py`.

python more_conversations.py subjects.jsonl aside.jsonl

What the target says in conversation is where its drafter is weakest, and a drafter learns more from a new subject than
from one it has seen. Those in `aside.jsonl` are for the confidence head alone.
Put together by a seeded generator; none is a question of a benchmark.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from conversations import NAMES, conversations, parts

# What stands in braces in an opening.
FILLERS = {
    "name": NAMES,
    "other_name": "Grace|Hugo|Nadia|Felix|Yuki|Samuel|Olga|Ravi|Ines|Paul",
    "number": "3|4|5|6|8|12|15|20|24|36|45|60|75|90|120",
    "small": "2|3|4|5|6|7|8|9",
    "percent": "5|10|15|20|25|30|40",
    "job": """
a nurse|an architect|a bus driver|a farmer|a software engineer|a violinist|a fisherman|a judge|a baker|a firefighter
a translator|a biologist|a carpenter|a journalist|an accountant|a kindergarten teacher|a pilot|a photographer
""",
    "business": """
a bookshop|a bicycle repair shop|a bakery|a yoga studio|a flower shop|a coffee truck|a pet hotel|a cinema|a hostel
a tailor's shop|a vegetable farm|an escape room|a music school|a second-hand store|a climbing gym|a small brewery
""",
    "object": """
an umbrella|a pencil|an old piano|a suitcase|a street lamp|a snowman|a coin|a mirror|a train station|a river|a cloud
a wristwatch|a rusty key|a bridge|a paper boat|a candle|a mountain|a kitchen table|a satellite|a postcard
""",
    "person": """
Marie Curie|Leonardo da Vinci|Ada Lovelace|Mahatma Gandhi|Cleopatra|Charles Darwin|Frida Kahlo|Galileo|Mozart
Nelson Mandela|Florence Nightingale|Isaac Newton|Jane Austen|Nikola Tesla|Rosa Parks|Confucius|Amelia Earhart
""",
    "country": """
India|Brazil|Germany|Egypt|South Korea|Italy|Kenya|Canada|Vietnam|Spain|Turkey|Argentina|Sweden|Morocco|Thailand|Peru
""",
    "feature": """
rivers|mountains|monsoons|harbours|deserts|forests|railways|trade routes|islands|volcanoes|climate|canals
""",
    "field": """
statistics|psychology|chemistry|economics|geometry|linguistics|computer networks|ecology|astronomy|law|nutrition
electrical engineering|probability|databases|geology|mechanics|cybersecurity|marketing|genetics|operating systems
""",
    "idea": """
opportunity cost|confirmation bias|recursion|a control group|entropy|the placebo effect|compound interest|overfitting
a public key|inertia|the bystander effect|standard deviation|a food chain|irony|symbiosis|the prisoner's dilemma
Ohm's law|sunk costs|correlation and causation|a derivative|pH|version control|cognitive dissonance|buoyancy|a metaphor
gradient descent|herd immunity|a hash table|biodiversity|the Doppler effect|comparative advantage|selection bias
""",
    "system": """
a rainwater tank for a school|a traffic light for a busy crossing|a greenhouse that waters itself|a library catalogue
a wheelchair ramp|a bird-feeding station|a delivery route for a bakery|a timetable for a school|a wind turbine
a recycling plan for an office|a parking guidance system|a heating plan for an old house|a small satellite
""",
    "event": """
a charity run|a school science fair|a wedding with eighty guests|a street festival|a chess tournament|a job interview
a family reunion|a class trip|a product launch|a book club|a first marathon|a farewell party|a photo exhibition
""",
    "pair": """
laptops and tablets|trains and planes|tea and coffee|cats and dogs|novels and films|rice and potatoes|Python and Java
gas stoves and induction stoves|cash and cards|summer and winter holidays|e-mail and telephone|football and basketball
renting and buying a flat|radio and podcasts|democracy and monarchy|bacteria and viruses|lists and tuples in Python
classical and jazz music|wind and solar power|mitosis and meiosis|arrays and linked lists|stocks and bonds
""",
    "thing_to_write": """
a birthday card|an opening speech|a short review|a news report|a diary entry|a fairy tale|a haiku|a limerick|a letter
a slogan|a recipe|a short story of two paragraphs|a monologue|a press release|an invitation|a blog post|a song text
""",
    "mood": "hopeful|mysterious|funny|sad|dramatic|calm|nostalgic|sarcastic|warm|suspenseful",
    "place": """
a railway station at night|a crowded beach|an old library|a kitchen before dinner|a football stadium|a snowy forest
a hospital corridor|a fishing harbour at dawn|an attic full of boxes|a classroom on the last day of school|a desert road
a rooftop garden|a flea market|a submarine|a small airport in a storm
""",
    "program": """
a to-do list|a number guessing game|a timer|a currency converter|a quiz with three questions|a shopping cart
a phone book|a tic-tac-toe game|a password generator|a weather report from given numbers|a calculator
a library of books with loans|a queue of customers|a word counter|a simple chat log|a grade book
""",
    "task": """
reverses the words of a sentence|finds the most frequent element of a list|computes a moving average
checks if two strings are anagrams|finds the median of a list|splits a list into chunks|computes the factorial of n
removes the vowels of a string|merges two dictionaries|counts the words in a file|finds the intersection of two lists
transposes a matrix|checks whether a year is a leap year|sorts words by their length|computes the sum of digits
finds the longest word|checks whether a tree is balanced|finds the k smallest numbers|renames all files in a folder
prints the numbers from 1 to 100 with words for multiples|downloads a page and counts its links|parses a date
""",
    "language": "Python|Python|JavaScript|C++|Java|Rust|HTML and JavaScript",
    "wrong": """
Yesterday me and him goes to the market, but we didn't bought nothing because the prices was to high.
The childrens was playing in the garden when it begin to rain, so they runned inside very quick.
I has been working here since five year, and I never seen so much peoples in the office like today.
She don't like neither coffee or tea, but she drink them anyways when her friends invites her.
If I would have knew about the meeting, I will come earlier and bring the documents what you needed.
There is many reasons for why he leaved the company, but the most important were he's boss.
""",
    "puzzle": """
{name} is taller than {other_name}, and {other_name} is taller than {name2}. Who is the shortest?
A farmer has {number} sheep. All but {small} run away. How many are left?
All roses are flowers, and some flowers fade quickly. Does it follow that some roses fade quickly?
Yesterday was two days after Monday. What day is tomorrow?
{name} has {small} brothers, and each brother has two sisters. How many sisters does {name} have at most?
A train leaves at {small} o'clock and travels {number} km at 60 km/h. When does it arrive?
You are in a dark room with a candle, a lamp and a stove, and only one match. What do you light first?
If it takes {small} machines {small} minutes to make {small} parts, how long do 100 machines need for 100 parts?
Three boxes are labelled apples, oranges and both, and every label is wrong. How many fruits must you take out?
A man walks one kilometre south, one east and one north and is where he began. Where could he be?
{name} always lies on weekdays. Today {name} says that tomorrow is Sunday. What can you say about today?
""",
    "sum": """
A shop sells {number} notebooks at ${small} each and {small} pens at $2 each. What is the total?
{name} drives {number} km in {small} hours. What is the average speed?
A jacket costs ${number}. It is reduced by {percent}%. What is the new price?
What is the area of a triangle with base {small} cm and height {number} cm?
Solve for x: {small}x + {number} = {number2}.
If f(x) = {small}x^2 - {number}x + 7, what is f({small2})?
The sum of three consecutive integers is {number2}. Which numbers are they?
A bag has {small} red and {small2} blue balls. What is the probability of drawing a red one?
What is the remainder when {number}{number2} is divided by {small}?
A garden is {small} m wide and {number} m long. How long is the fence around it?
{name} saves ${small} per week. After how many weeks does {name} have ${number}?
How many different ways are there to arrange {small} books on a shelf?
Which integers satisfy abs(x - {small}) < {small2}?
""",
    "text": """
The town council of Marlow decided on Tuesday to close the old bridge for repairs. Engineer Paula Stern of Bridgeworks \
said that the work would cost 2.4 million dollars and last until May. Shop owners fear that they will lose customers.
In 2019 the Brightwater Company opened a factory in Leeds that makes bottles from recycled plastic. Its director, Omar \
Haddad, plans to open a second one in Porto in 2023 and to employ 150 people there.
Dr. Lena Fischer, who leads the seed bank in Oslo, has collected 4,000 kinds of wheat in thirty years. Together with \
Professor Ito from Nagoya she now studies which of them need little water.
The museum will show 60 paintings by Clara Voss from June 3 to August 20. Tickets cost 12 euros, students pay 7. On \
Mondays it is closed, and on the first Sunday of each month admission is free.
The river rose by two metres in one night. Firefighters from Altdorf and Bern brought 300 people to safety, said mayor \
Karin Weber. The school and the train station remain closed until Friday.
Revenue of Northwind Foods grew from 12 million dollars in 2020 to 15 million in 2021, while its costs rose from 9 to \
13 million. The company blames the price of sugar and plans to sell its factory in Lyon.
Honey bees visit about two million flowers for a jar of honey. A colony of 40,000 bees needs some 60 kilograms a year \
for itself. In winter the bees form a ball and keep its middle at 25 degrees.
""",
}
OPENINGS = """
Imagine you are {object}. Describe one day of your life.|Act as {job} and explain what you like about your work.
Pretend to be {person}. What do you think of our time?|You are {job}. A customer is angry. What do you say?
Pretend to be {object} that can talk. What would you say to a child?|Act as {person} and introduce yourself to a class.
Write {thing_to_write} about {object}.|Write {thing_to_write} for {event}.|Write {thing_to_write} with a {mood} mood.
Describe {place} in one {mood} paragraph.|Write the first paragraph of a {mood} story that begins in {place}.
{name} and {other_name} meet in {place}. Write their dialogue.|Compose a {mood} poem about {object} in {place}.
Draft a business plan for {business} in five steps.|Write an advertisement for {business}.
What should I think of before opening {business}?
Draft an e-mail in which {name} asks {other_name} for help with {event}.
Plan {event}. What are the most important steps?|Give me a checklist for {event}.
Design {system}. Name the main parts and how they work together.|What could go wrong with {system}?
Compare {pair} in a short text.
Make an outline of an article that compares {pair}.|Which is better: {pair}? Give reasons.
What is {idea}? Give three examples.|Explain {idea} to {job}.|Why is {idea} important in {field}?
How is {idea} used in daily life?|Write an analogy that explains {idea}.|What should a beginner in {field} learn first?
Name five key ideas of {field}.|What is the difference between {field} and {field2}?
How did {feature} influence the history of {country}? List three points.|What are good manners for a guest in {country}?
Suggest a plan for three days in {country}.|Tell me about the life of {person}.|What made {person} famous?
How did {person} change the way people think?|What would {person} and {person2} talk about?
Correct the grammar of this text: {wrong}|Edit this paragraph so that it is clear and correct: {wrong}
{text}\\nWho and what is named in this text? Answer as a list.|{text}\\nSummarise this text in one sentence.
{text}\\nWhat are the numbers in this text, and what do they stand for?|{text}\\nWrite three questions about this text.
{text}\\nAnswer in JSON: the people, the places and the dates in this text.
{text}\\nWhat is the main point of this text?
{puzzle}|{puzzle}|{puzzle}|{puzzle}|{sum}|{sum}|{sum}|{sum}
Write a function in {language} that {task}.|Write a {language} program that {task}. Explain how you test it.
Build {program} in {language}.|Write a small website with {program}.|What is wrong with a program that {task} slowly?
How would you structure a program for {program}?|Write a class in Python for {program}.
"""
REPLIES = """
Can you say that in simpler words?|Give an example.|Why?|What are the disadvantages?|Make it half as long.
Now write it as a list of bullet points.|Can you explain the second point in more detail?|Are you sure? Check it again.
What would change if there were no electricity?|Rewrite it for a newspaper.|What is the most important part, and why?
Write the opposite opinion.|How would an expert criticise your answer?|What should I do next?
Use this to write a short story.|Which questions would a student ask about this?|Turn your answer into a table.
Begin every sentence with a different letter.|How much would it cost?|Explain each step.|Add a conclusion.
Suggest a title.|What did you leave out?|Could you improve it?|Write an introduction to it.|Give me two alternatives.
"""
COUNT = 460
ASIDE = 80


def fill(text: str, source: random.Random, fillers: dict[str, str] = FILLERS) -> str:
    """Replace each name in braces by one of its fillers; a name with a 2 behind it draws from the same."""
    while "{" in text:
        start, end = text.rindex("{"), text.index("}", text.rindex("{"))
        text = text[:start] + source.choice(parts(fillers[text[start + 1 : end].rstrip("2")])) + text[end + 1 :]
    return text


def add(
    found: dict[str, list[str]],
    enough: int,
    openings: list[str],
    replies: list[str],
    source: random.Random,
    fillers: dict[str, str] = FILLERS,
) -> None:
    """Add conversations until there are enough: every opening in turn, so that none is rare."""
    while len(found) < enough:
        source.shuffle(openings)
        for opening in openings:
            text = fill(opening, source, fillers).replace("\\n", "\n")
            if len(found) < enough:
                found.setdefault(text, [text, fill(source.choice(replies), source, fillers)])


def write(found: dict[str, list[str]], source: random.Random, aside: int, paths: list[str]) -> None:
    """Shuffle conversations into two files, so many of them into the second; or all into one."""
    prompts = list(found.values())
    source.shuffle(prompts)
    lines = [json.dumps({"domain": "chat", "turns": turns}) + "\n" for turns in prompts]
    first = len(lines) - aside
    for path, part in zip(paths, (lines[:first], lines[first:]) if aside else (lines,), strict=True):
        Path(path).write_text("".join(part), encoding="utf-8")


def main() -> None:
    source = random.Random(11)
    known = {opening for opening, _ in conversations(random.Random(5))}
    found: dict[str, list[str]] = {}
    # Those of `conversations.py` once more, as far as another seed makes them others.
    for turns in source.sample(conversations(random.Random(12)), 200):
        if turns[0] not in known:
            found[turns[0]] = turns
    add(found, len(found) + COUNT, parts(OPENINGS), parts(REPLIES), source)
    write(found, source, ASIDE, sys.argv[1:])


if __name__ == "__main__":
    main()
