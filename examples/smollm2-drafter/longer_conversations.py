"""Conversations of two turns whose questions say more than one thing at a time, again on other subjects.

python longer_conversations.py lengthy.jsonl aside.jsonl further.jsonl

People rarely ask in one short sentence, as most openings of `more_conversations.py` do: they set a scene, name
conditions, paste a text. Those in `aside.jsonl` are for the confidence head alone; those in
`further.jsonl` are made of the same, and none opens as another does. Put together by a seeded generator; none is a
question of a benchmark.
"""

from __future__ import annotations

import random
import sys

from more_conversations import FILLERS as KNOWN
from more_conversations import add, parts, write

FILLERS = {
    **{name: KNOWN[name] for name in ("number", "small", "percent", "mood", "language", "event")},
    "name": "Amara|Tobias|Mei|Ricardo|Freya|Kofi|Leila|Bruno|Hana|Stefan|Priya|Duncan|Zoe|Emeka|Carla|Igor",
    "trade": """
a beekeeper|a locksmith|a sound engineer|a midwife|a crane operator|a florist|an optician|a court reporter|a glassblower
a flight attendant|a geologist|a speech therapist|a tram driver|a chess coach|a stage designer|a surveyor|a dentist
a park ranger|a piano tuner|a cheesemaker|an interpreter|a lifeguard|a data analyst|a social worker
""",
    "voice": """
an ancient oak door|a lighthouse|a retired circus elephant|a satellite that has lost contact|the Moon|a worn-out boot
a grumpy vending machine|a museum statue|the last letter of the alphabet|a lonely whale|a garden gnome|an hourglass
a violin in a pawnshop|a snowflake|a village well|an old radio|a lost glove|a scarecrow|a steam engine|a wandering comet
""",
    "figure": """
Johannes Kepler|Hypatia|Emmy Noether|Alan Turing|Simone de Beauvoir|Ibn Khaldun|Maria Montessori|Louis Pasteur
Sappho|Alexander von Humboldt|Harriet Tubman|Ludwig van Beethoven|Grace Hopper|Socrates|Srinivasa Ramanujan
Rachel Carson|Marco Polo|Wangari Maathai|Johann Gutenberg|Katherine Johnson|Michelangelo|Virginia Woolf
""",
    "land": """
Japan|Portugal|Ghana|Iceland|Indonesia|Poland|Chile|New Zealand|Mongolia|Greece|Jordan|Ireland|Colombia|Nepal|Finland
Tanzania|the Netherlands|Austria|Pakistan|Cuba|Ethiopia|Norway|the Philippines|Hungary
""",
    "topic": """
tides|earthquakes|magnetism|sleep|digestion|the immune system|friction|crystals|soil|coral reefs|memory|colour vision
fermentation|glaciers|lightning|antibiotics|bird migration|radioactivity|the ozone layer|hormones
bridges and their loads
rockets|electric motors|refrigerators|the nitrogen cycle|sound waves|stem cells|hurricanes|catalysts|fossil fuels
""",
    "subject": """
inflation|the separation of powers|the Silk Road|the printing press|the Renaissance|urban planning|free trade|ethics
the industrial revolution|poverty|social media and elections|the Roman Republic|the history of writing|human rights
utilitarianism|the Enlightenment|migration|minimum wages|the Cold War|stoicism|public transport|taxation|cultural memory
existentialism|supply and demand|the French Revolution|the abolition of slavery|monetary policy|propaganda|feudalism
""",
    "skill": """
public speaking|negotiation|time management|critical reading|taking notes|giving feedback|first aid|mental arithmetic
learning vocabulary|writing essays|leading a meeting|saving money|debugging|active listening|map reading|meditation
""",
    "thing": """
a cargo bicycle|a rainproof tent|a reading lamp|a children's encyclopaedia|a robot vacuum cleaner|a pressure cooker
a pair of hiking boots|an e-book reader|a bread knife|a board game about trains|an air purifier|a garden shed
""",
    "setting": """
an abandoned theatre|a small bakery at five in the morning|a mountain hut during a blizzard|a harbour full of fog
a laboratory under the sea|a village fair|an overcrowded night bus|a monastery garden|a busy airport|a clock tower
a greenhouse full of orchids|a street market in the rain|a courtroom|a spaceship on its way home|a frozen lake
""",
    "trouble": """
two colleagues do not speak to each other|a new employee makes many mistakes|the budget was cut by {percent} percent
the neighbours play loud music every night|a friend never pays back what he borrows
a customer wants a refund after a year|half of the volunteers have cancelled|my teenage son has stopped reading
the team misses every deadline|two of my best employees want to leave|our regular supplier went bankrupt
the children argue about the computer
""",
    "routine": """
returns the longest common prefix of a list of strings|rotates a list by k places|validates an e-mail address
converts Roman numerals to integers|finds the longest increasing run in a list|computes the n-th prime
checks whether a string of brackets is balanced|groups words that are anagrams|finds a cycle in a linked list
prints a calendar of a month|removes duplicates from a sorted list in place|multiplies two matrices
finds the shortest path in a grid|evaluates an expression in postfix notation|inserts a key into a binary search tree
computes the edit distance of two words|shuffles a deck of cards|counts islands in a grid|merges k sorted lists
reads a CSV file and prints the mean of each column|compresses a string by run lengths|converts a number to binary
""",
    "application": """
a web page that shows a different proverb on each click|a stopwatch with laps|a small address book with search
a script that backs up a folder|a text adventure with three rooms|a server that counts its visitors|a unit converter
a program that draws a bar chart of characters|a chat bot with five fixed answers|a flash-card trainer
a page with a form that checks its input|a bank account with deposits and withdrawals|a memory game
""",
    "arithmetic": """
{name} buys {small} kg of apples at ${small2} per kg and pays with a ${number} note. How much change is there?
A tank holds {number} litres. A pump fills {small} litres per minute and a leak loses 1. When is it full?
The points (0, 0), ({small}, 0) and ({small}, {small2}) form a triangle. What are its area and its perimeter?
A die is rolled twice. What is the probability that the sum is {small}?
Given f(x) = {small}x^3 - {small2}x + {number}, find f(2) and f(-1).
How many whole numbers satisfy abs(x - {number}) < {small}?
{name} is {number} years old and twice as old as the sister was {small} years ago. How old is the sister?
In a class of {number} students, {percent}% play football and {percent2}% play chess. How many play football?
Solve the system x + y = {number} and x - y = {small}.
A recipe for {small} people needs {number} g of flour. How much is needed for {small2} people?
What is the greatest common divisor of {number} and {number2}? And the least common multiple?
The price of a ticket rose from ${small} to ${number}. By how many percent did it rise?
Two trains start towards each other, {number}0 km apart, at {number2} and 60 km/h. When do they meet?
A sequence begins with {small} and every term is {small2} more than the one before. What is the tenth term?
Find the derivative of {small}x^2 + {small2}x - {number} and where it is zero.
""",
    "riddle": """
{name} is the fifth in a queue from the front and {name2} the third from the back; two people stand between them. How \
long is the queue?
{name} sits left of Ben, and Ben sits left of {name2}. If the outer two swap places, who sits on the left?
Every guest shook hands with every other guest once, {number} handshakes in all. How many guests were there, roughly?
If it rains, the match is cancelled. The match was not cancelled. What do we know about the weather?
Some musicians are teachers. All teachers are patient. Are some musicians patient? Explain each step.
{name} parks in front of a hotel and loses all the money. Nobody stole anything. What happened?
A clock strikes six in five seconds. How long does it take to strike twelve?
You have a bucket of five litres and one of three. How do you measure four litres?
Yesterday {name} said: tomorrow will be Friday. What day is it today?
{name} has three boxes, each holds {small} bags, and each bag {small2} marbles. One box is lost. How many are left?
A is north of B, C is east of B, and D is south of C. In which direction is D from A?
Which word does not belong: copper, silver, marble, iron? And why?
{name}'s mother has four children: April, May, June, and who is the fourth?
""",
    "passage": """
Subject: moving the workshop. Dear all, the workshop of March 4 moves to room 217, because the heating in the hall is \
broken. Mr. Okoro brings the projector, Ms. Lindqvist the handouts. We begin at 9:30 and end at 16:00. Please tell \
Daniel by Monday if you want lunch. It costs 8 euros.
Helsinki, Friday. The shipbuilder Norrvik has won an order for two ferries worth 310 million euros. The first shall \
sail between Turku and Stockholm in 2026. Its chief executive Aino Mattila spoke of the largest order in ten years. \
The union welcomed the news but warned that 200 welders are missing.
The novel "The Salt Road" by Ines Duarte, published in 1987, follows the surveyor Tomás through the desert. In "Winter \
Orchard" (1994) by Paul Renner a family of fruit growers waits for a son. "Glass Harbour" by Mina Sato, 2003, is the \
diary of a customs officer.
The hotel is close to the station and the breakfast was excellent. Our room, however, faced the street, and the \
window did not close. The staff apologised twice but did nothing. I would come back for the breakfast alone.
A blue whale's heart weighs about 180 kilograms and beats eight times a minute at the surface, two times when it \
dives. In 2019 researchers from Stanford attached a sensor to a whale in Monterey Bay and measured it for nine hours.
In the second quarter the branch in Lyon sold 1,240 bicycles, 15 percent more than a year before. Gent sold 980, as \
many as last year, and Porto 450, half as many, because the shop was closed in May. The most popular colour was green.
The recipe asks for 300 g of lentils, two carrots, one onion and a litre of broth. Fry the onion, add the rest, and \
let it simmer for forty minutes. Lemon juice comes last. It keeps for three days and serves four.
Three reviews. First: a dull film with a brilliant ending. Second: I laughed, I cried, I would watch it again at once. \
Third: the actors do what they can, but nobody can save this script.
Long ago the river was the border of two kingdoms. Whoever wanted to cross had to pay a fish. One day a child came \
with nothing but a song. The ferryman listened, forgot the fish, and rowed so slowly that the song could last.
The experiment used 48 plants in four groups. Group A had light for 8 hours, B for 12, C for 16 and D for 20. After \
six weeks the plants measured 11, 17, 24 and 22 cm on average. Two plants of group D died.
""",
    "extract": """
List every name of a person, a place and an organisation in it.|Which numbers appear in it, and what do they count?
Answer in JSON with the keys people, places, dates and amounts.|Write it as a table with three columns.
Shorten it to one sentence, without losing a fact.|Which two facts matter most to the reader, and why?
Is its tone positive, negative or neutral? Give a mark from 1 to 5.|Rewrite it as a telephone call of six lines.
Write three questions that it answers and one that it does not.|Put its events in the order of time.
""",
    "flawed": """
me and my brother has went to the lake last summer, it were beautifull but the water was to cold for swim in it
Their going to there house because they're car dont work no more, and nobody knowed how to fixed it
the informations in this report is wrong, becaus the datas was collect bad and nobody have check them
He said that he will comes tomorrow, but yesterday he didnt came neither, so we is waiting since two week
""",
}
OPENINGS = """
You are {voice}. Tomorrow everything will change for you. Tell what you have seen, and what you will miss most.
Play the part of {trade} on the first day at work. Everything goes wrong. Tell it in the first person, with humour.
For the rest of this conversation speak as {figure}. A journalist of today asks: what are you most proud of?
Act as {trade}. I will describe a problem, and you ask me three questions before you answer. My problem: {trouble}.
You are a patient tutor. A pupil of twelve years asks you about {topic}. Explain without difficult words, then ask one.
Be a fair judge: two friends argue about {subject}. State both positions in two sentences each, then decide.
I want you to be a tour guide in {land}. Greet a group of tired travellers and tell them what today will bring.
Write a story of three short paragraphs that takes place in {setting}. Its mood is {mood}, and its hero is {trade}.
Write the opening of a novel set in {setting}. Use all five senses, and do not name any person.
Describe {setting} through the eyes of {trade}, in about a hundred words, with one surprising comparison.
Write a {mood} letter from {name} to {name2}, ten years after they last met in {setting}.
Write a speech of one minute for {event}. Thank three people, tell one joke, and end with a wish.
Write an honest review of {thing}. Mention what is good, what is not, and for whom it is made.
Write a blog post about {thing}: a title, three headings, and two sentences below each of them.
Draft a polite but firm e-mail. The situation: {trouble}. The reader should feel respected and know what to do.
The situation is this: {trouble}. Suggest three ways to deal with it, with one advantage and one risk of each.
I teach a class about {subject}. Give me a plan for a lesson of 45 minutes, with one question for every part.
Name the five most important facts about {subject}, from the oldest to the newest, one sentence each.
How did {subject} change daily life? Name three examples and say for each who gained and who lost.
What connects {subject} and {subject2}? Explain it to somebody who has heard of neither.
Discuss whether {subject} still matters today. Write two paragraphs, one for and one against.
How have the mountains, rivers and coasts of {land} shaped its trade and its food? Give three points.
My company sends me to {land} for a year. What should I know about greetings, meals and punctuality?
Compare how {figure} and {figure2} worked. What did they have in common, and what could neither do without?
What problem did {figure} try to solve, and how? Keep it under 120 words and mention one failure.
Explain {topic} in three levels: to a child, to a student, and to {trade}.
What are the main causes of {topic}, and how do scientists study them? Use short paragraphs.
Which common mistakes do people make when they talk about {topic}? Correct three of them.
Design a simple experiment about {topic} for a school. List materials, steps, and what the pupils should measure.
Engineers must keep {topic} in mind when they plan a town. Give four reasons and one example.
I want to get better at {skill}. Give me a plan for four weeks, with one small task for each week.
What is the difference between good and bad {skill}? Show it in a short dialogue of {name} and {name2}.
{passage}\\n\\n{extract}|Read this text carefully. {extract}\\n\\n"{passage}"|{extract}\\n\\nText: {passage}
{passage}\\n\\n{extract}|Here is a text:\\n{passage}\\n\\n{extract}
Correct all mistakes in the following text and say what was wrong: {flawed}
Rewrite this so that it could be printed in a newspaper: {flawed}
{arithmetic}|{arithmetic} Show each step.|{arithmetic}|Help me with my homework. {arithmetic}|{arithmetic}
{riddle}|{riddle}|{riddle} Think step by step.|{riddle}
Write a function in {language} that {routine}. Say how its running time grows.
Write a {language} function that {routine}. It must not change its input.|Create {application} in {language}.
I have to write a function that {routine}. Explain the idea first, then give the code in {language}.
Build {application}. Use {language} and as few lines as possible, and explain how to run it.
My function {routine}, but it is too slow for a million items. What would you try first?
"""
REPLIES = """
Now write the same from the opposite point of view.|Take the second point and give two examples from everyday life.
Write it again in half the words.|What if the number were twice as large?|How would you check that this is right?
Put it in the form of a poem with four lines.|Explain your answer to a ten-year-old.|What is the weakest part of it?
Replace every adjective by another one.|Turn it into a dialogue between two friends.|Name one thing that could go wrong.
Which of these points would you drop, and why?|Write a title and a summary of one sentence.|Is there a simpler way?
Make it more formal.|Make it funnier.|Continue with what happens next.|How would {trade} see this?
What would {figure} say about it?|Would this be different in {land}?|Write it as a numbered list with reasons.
Rewrite it so that it fits on a postcard.|Give me a counterexample.|Add numbers and dates where you can.
Suppose that I disagree. Convince me.|What do I need to know before I begin?|Test it with an example.
Now do it without using the letter z.|Translate the main idea into a proverb.|And if it were the other way round?
"""
COUNT = 640
ASIDE = 100
FURTHER = 448


def main() -> None:
    source = random.Random(31)
    found: dict[str, list[str]] = {}
    add(found, COUNT, parts(OPENINGS), parts(REPLIES), source, FILLERS)
    *paths, further = sys.argv[1:]
    known = set(found)
    write(found, source, ASIDE, paths)
    source = random.Random(32)
    add(found, COUNT + FURTHER, parts(OPENINGS), parts(REPLIES), source, FILLERS)
    write({opening: turns for opening, turns in found.items() if opening not in known}, source, 0, [further])


if __name__ == "__main__":
    main()
