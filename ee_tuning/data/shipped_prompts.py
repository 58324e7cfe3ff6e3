"""Built-in chat prompts: everyday questions, small programs, and Python documentation to be rephrased.

They are the same on every machine, except that the documentation is the running Python's.
"""

import ast
import hashlib
import itertools
from collections.abc import Iterator

from ee_tuning.data.sample_corpus import sample_corpus
from ee_tuning.errors import InputError

_TOPICS = """
the water cycle; photosynthesis; gravity; volcanoes; earthquakes; the seasons; rainbows; the moon; black holes; electricity; magnets;
batteries; steam engines; bicycles; trains; airplanes; sailing; bridges; lighthouses; maps; compasses; clocks; calendars; the alphabet;
printing; libraries; museums; theatre; painting; photography; drums; the piano; folk music; dancing; cooking rice; baking bread;
making soup; growing tomatoes; compost; bees; butterflies; birds that migrate; whales; octopuses; wolves; cats; dogs; horses; elephants;
dinosaurs;
fossils; rivers; deserts; rainforests; glaciers; islands; the ocean floor; clouds; wind power; solar panels; recycling; clean water;
vaccines; sleep; walking every day; stretching; healthy breakfasts; drinking enough water; learning a language; keeping a diary;
reading aloud; public speaking; asking for help; saying sorry; saving money; taxes; insurance; job interviews; working from home;
team meetings; writing emails; planning a trip; packing a suitcase; camping; first aid; chess; football; swimming; running a marathon;
knitting; woodworking; fixing a flat tyre; moving house; neighbours; birthdays; gifts; ancient Rome; the pyramids; castles;
the Silk Road; the Olympic Games; elections; courts of law; prime numbers; fractions; averages; probability; triangles; the number pi;
computers; the internet; passwords; robots; chess programs; search engines; databases; programming languages
"""
_FORMS = """
What is the most important thing to know about {}?
Explain {} to a ten-year-old.
Give me five facts about {}.
Write a short story that has to do with {}.
Write a four-line poem about {}.
I know nothing about {}. Where should I start?
What do people often get wrong about {}?
Write an email to a friend in which you tell what you learned about {}.
List three questions that a teacher could ask about {}, with their answers.
Why should anyone care about {}? Answer in two sentences.
Write a dialogue between two people who disagree about {}.
Compare {} with something else that is like it.
Give me a title and an outline for an essay on {}.
Summarize the history of {} in one paragraph.
Make a checklist to do with {}.
What could {} look like in a hundred years?
"""
_TASKS = """
reverses a string; counts the vowels in a text; tells whether a number is prime; finds the largest number in a list; removes duplicates
from a list and keeps their order; computes the factorial of a number; gives the first n Fibonacci numbers; tells whether a word is a
palindrome; merges two sorted lists; sorts a list of words by their length; counts how often each word occurs in a text; converts Celsius to
Fahrenheit; finds the greatest common divisor of two numbers; flattens a nested list; transposes a matrix; reads a CSV file and adds up one
column; checks whether brackets are balanced; converts a number to binary; finds the second smallest number in a list; splits a list into
chunks of n elements; computes the mean and the median of a list; finds all files with a given ending in a folder; turns snake_case into
camelCase; validates an email address; draws a random password; groups a list of people by their age; implements binary search; implements
a stack; counts the days between two dates; replaces several spaces by one
"""
_TASK_FORMS = """
Write a Python function that {}.
Write a Python function that {}, with a docstring and one test.
How would you write a function that {}? Explain first, then show the code.
What can go wrong in a function that {}?
"""
_DOCUMENTATION_FORMS = (
    "Put this documentation of Python's {} into plain words:\n\n{}",
    "Summarize this in one sentence. It documents Python's {}.\n\n{}",
    "Here is the documentation of Python's {}. Show by an example how it is used.\n\n{}",
)
_DOCUMENTATION_CHARACTERS = range(150, 900)
_FIRST_OF_A_FILE = 2


def shipped_prompts(count: int) -> Iterator[str]:
    """Yields `count` different prompts, with all kinds from the start. Raises InputError where there are fewer."""
    if count < 0:
        raise InputError(f"--shipped-prompts must be a number of prompts, got {count}")
    everyday = _filled(_FORMS, _TOPICS)
    kinds = [everyday, _filled(_TASK_FORMS, _TASKS), everyday, _of_documentation()]
    made = 0
    while made < count:
        if not (turn := [prompt for kind in kinds if (prompt := next(kind, None)) is not None]):
            raise InputError(f"--shipped-prompts must be at most {made}, of which there are no more, got {count}")
        yield from turn[: count - made]
        made += len(turn)


def _filled(forms: str, words: str) -> Iterator[str]:
    """Yields every combination of forms and words, with both varying from one to the next."""
    lines, items = forms.strip().split("\n"), [" ".join(word.split()) for word in words.split(";")]
    for shift in range(len(lines)):
        for place, word in enumerate(items):
            yield lines[(place + shift) % len(lines)].format(word)


def _of_documentation() -> Iterator[str]:
    """Yields files in an order that mixes subjects, a few functions of each at a time."""
    forms, others = itertools.cycle(_DOCUMENTATION_FORMS), list[tuple[str, str]]()
    training, _ = sample_corpus()
    for name in sorted(training, key=lambda name: hashlib.sha256(name.encode()).digest()):
        documented = _documented(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."), training[name])
        for each in documented[:_FIRST_OF_A_FILE]:
            yield next(forms).format(*each)
        others += documented[_FIRST_OF_A_FILE:]
    for each in others:
        yield next(forms).format(*each)


def _documented(module: str, source: bytes) -> list[tuple[str, str]]:
    """Yields name and documentation of each public function and class with documentation of moderate length."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    found = [
        (f"{module}.{node.name}", ast.get_docstring(node) or "")
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    return [each for each in found if len(each[1]) in _DOCUMENTATION_CHARACTERS]
