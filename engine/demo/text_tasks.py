"""Single-turn kinds on plain text: repeat, reverse, sort, add, subtract, count, extract."""

import json
import random
import string
from typing import Any

from engine.demo import words
from engine.demo.samples import Sample, article, ask, pick

REPEAT = (
    "Repeat these words: {}", "Repeat: {}", "Repeat after me: {}", "Please repeat: {}",
    "Repeat these words exactly: {}", "Repeat the following words: {}", "Say these words: {}",
    "Echo the following: {}", "Copy this exactly: {}", "Repeat this:\n{}", "Say: {}",
    "Repeat the words {}", 'Repeat "{}"', "Repeat the following text: {}", "Say this again: {}",
)  # fmt: skip
REVERSE = (
    "Reverse these words: {}", "Reverse the order of these words: {}", "Reverse: {}",
    "Say these words backwards: {}", "Write these words in reverse order: {}",
    "Reverse the word order: {}", "Put these words in reverse order: {}", "Reverse the list: {}",
)  # fmt: skip
ASCENDING = (
    "Sort ascending: {}", "Sort these numbers: {}", "Sort: {}",
    "Sort these numbers in ascending order: {}", "Sort from smallest to largest: {}",
    "Sort these numbers from smallest to largest: {}", "Put these numbers in order: {}",
    "Sort this list: {}", "Sort the numbers {}",
)  # fmt: skip
DESCENDING = (
    "Sort descending: {}", "Sort these numbers in descending order: {}",
    "Sort from largest to smallest: {}", "Sort these numbers from largest to smallest: {}",
)  # fmt: skip
ALPHABETICAL = (
    "Sort these words: {}", "Sort these words alphabetically: {}", "Sort alphabetically: {}",
    "Put these words in alphabetical order: {}", "Sort the words {}", "Sort this list: {}",
)  # fmt: skip
ADD = (
    "What is {a} + {b}?", "{a} + {b}", "{a} + {b} = ?", "Add {a} and {b}.", "{a}+{b}",
    "What is {a} plus {b}?", "Calculate {a} + {b}.", "How much is {a} + {b}?", "What's {a} + {b}?",
    "Compute {a} + {b}", "What is the sum of {a} and {b}?", "What is {a}+{b}?",
    "{n} has {a} coins and gets {b} more. How many coins does {n} have now?",
)  # fmt: skip
SUBTRACT = (
    "What is {a} - {b}?", "{a} - {b}", "{a} - {b} = ?", "Subtract {b} from {a}.", "{a}-{b}",
    "What is {a} minus {b}?", "Calculate {a} - {b}.", "How much is {a} - {b}?",
    "What's {a} - {b}?", "Compute {a} - {b}", "What is {a}-{b}?",
    "{n} has {a} coins and gives {b} away. How many coins does {n} have now?",
)  # fmt: skip
COUNT = (
    "How many letter {l} are in {w}?", "How many {l} are in {w}?", "Count the letter {l} in {w}.",
    "How many times does the letter {l} appear in {w}?", 'How many "{l}" are in "{w}"?',
    "How many {l}'s are in {w}?", "How many letters {l} are there in {w}?",
    "How many {l}s are in the word {w}?", 'How many letter "{l}" are in the word "{w}"?',
)  # fmt: skip
LENGTH = ("How many letters are in {w}?", "How many letters does {w} have?", "How long is {w}?")


def made_up_word(rng: random.Random) -> str:
    """A word outside the list, so that copying does not depend on the list."""
    letters = rng.choice((string.ascii_lowercase, string.ascii_letters, string.hexdigits))
    return "".join(rng.choice(letters) for _ in range(rng.randint(2, 7)))


def word_list(rng: random.Random, longest: int) -> list[str]:
    """Some words: mostly from the list, sometimes with names, numbers or made-up ones."""
    few = rng.randint(2, 9)
    count = min(longest, few if rng.random() < 0.7 else rng.randint(10, 44))
    style = rng.random()
    if style < 0.65:
        return rng.sample(words.PLAIN, count)
    if style < 0.82:
        return rng.sample(words.ALL, count)
    if style < 0.92:
        return [rng.choice(words.PLAIN) for _ in range(count)]
    odd = (made_up_word, lambda r: str(r.randrange(1000)), lambda r: r.choice(words.UNICODE))
    count = min(count, 10)
    return [rng.choice(odd)(rng) if rng.random() < 0.4 else rng.choice(words.ALL)
            for _ in range(count)]  # fmt: skip


def join(rng: random.Random, items: list[str]) -> str:
    """The items with one of the usual separators."""
    return rng.choice((" ", " ", ", ")).join(items)


def repeat(rng: random.Random) -> Sample:
    """Say the same words again."""
    items = word_list(rng, 44)
    text = join(rng, items)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:] + rng.choice((".", "!", "?"))
    return ask("repeat", f"repeat {' '.join(items)}", pick(rng, REPEAT).format(text), text,
               "I copy the text.")  # fmt: skip


def reverse(rng: random.Random) -> Sample:
    """Say the words in the opposite order."""
    items = word_list(rng, rng.randint(3, 9))
    separator = rng.choice((" ", " ", ", "))
    answer = separator.join(items[::-1])
    question = pick(rng, REVERSE).format(separator.join(items))
    return ask("reverse", f"reverse {' '.join(items)}", question, answer, "I start at the end.")


def sort(rng: random.Random) -> Sample:
    """Sort numbers up or down, or words alphabetically."""
    separator = rng.choice((" ", " ", ", "))
    if rng.random() < 0.35:
        items = rng.sample(words.SORTABLE, rng.randint(2, 5))
        phrase, ordered = pick(rng, ALPHABETICAL), sorted(items)
    else:
        top = rng.choice((10, 100, 100))
        numbers = rng.sample(range(top), rng.randint(3, 5))
        down = rng.random() < 0.3
        items = [str(n) for n in numbers]
        phrase = pick(rng, DESCENDING if down else ASCENDING)
        ordered = [str(n) for n in sorted(numbers, reverse=down)]
    answer = separator.join(ordered)
    thought = f"There are {len(items)}. First {ordered[0]}, last {ordered[-1]}."
    return ask("sort", f"sort {' '.join(items)}", phrase.format(separator.join(items)), answer,
               thought)  # fmt: skip


def operands(rng: random.Random) -> tuple[int, int]:
    """Two numbers below 50; single digits are drawn more often than their share."""
    return rng.randrange(rng.choice((10, 50, 50, 50))), rng.randrange(rng.choice((10, 50, 50, 50)))


def add(rng: random.Random) -> Sample:
    """Add two numbers below 50."""
    a, b = operands(rng)
    question = pick(rng, ADD).format(a=a, b=b, n=rng.choice(words.NAMES))
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    thought = f"ones: {a % 10} + {b % 10} = {ones}. tens: {a // 10} + {b // 10} = {tens}."
    if ones > 9:
        thought += f" carry 1: {tens + 1}."
    return ask("add", f"add {min(a, b)} {max(a, b)}", question, str(a + b), thought)


def subtract(rng: random.Random) -> Sample:
    """Subtract the smaller of two numbers below 50 from the larger."""
    b, a = sorted(operands(rng))
    question = pick(rng, SUBTRACT).format(a=a, b=b, n=rng.choice(words.NAMES))
    ones, tens = a % 10 - b % 10, a // 10 - b // 10
    if ones < 0:
        thought = f"borrow: {a % 10 + 10} - {b % 10} = {ones + 10}."
        thought += f" tens: {a // 10} - {b // 10} - 1 = {tens - 1}."
    else:
        thought = f"ones: {a % 10} - {b % 10} = {ones}. tens: {a // 10} - {b // 10} = {tens}."
    return ask("subtract", f"subtract {a} {b}", question, str(a - b), thought)


def count(rng: random.Random) -> Sample:
    """Spell a word, numbering the letter that is asked for, then say how often it occurs."""
    word = rng.choice(words.SPELLED)
    if rng.random() < 0.15:
        question = pick(rng, LENGTH).format(w=word)
        numbered = " ".join(f"{letter} {i}" for i, letter in enumerate(word, 1))
        return ask("count", f"length {word}", question, f"{numbered}: {len(word)}", "I spell it.")
    letter = rng.choice(word if rng.random() < 0.85 else string.ascii_lowercase)
    marked, found = [], 0
    for each in word:
        found += each == letter
        marked.append(f"{each} {found}" if each == letter else each)
    question = pick(rng, COUNT).format(l=letter, w=word)
    answer = f"{' '.join(marked)}: {found}"
    return ask("count", f"count {letter} {word}", question, answer, f"I look for {letter}.")


FIELDS: dict[str, tuple[str, ...]] = {
    "name": ("{name}",),
    "age": ("is {v} years old", "is {v}"),
    "city": ("lives in {v}", "is from {v}"),
    "job": ("works as {a}", "is {a}"),
    "pet": ("has {a}",),
    "color": ("likes {v}", "loves the color {v}"),
}
EXTRACT = (
    "Extract the {f} as JSON: {t}", "Extract {f} as JSON: {t}", "{t} Extract the {f} as JSON.",
    "Return the {f} as JSON: {t}", "Give me the {f} as JSON.\n{t}",
    "Extract the fields {f} as JSON from this text: {t}", "Extract {f} as JSON.\n\n{t}",
)  # fmt: skip


def extract(rng: random.Random) -> Sample:
    """Read fields out of a sentence and write them as a JSON object."""
    values: dict[str, Any] = {
        "name": rng.choice(words.NAMES), "age": rng.randint(1, 99),
        "city": rng.choice(words.CITIES), "job": rng.choice(words.JOBS),
        "pet": rng.choice(words.ANIMALS), "color": rng.choice(words.COLORS),
    }  # fmt: skip
    told = rng.sample([f for f in FIELDS if f != "name"], rng.randint(1, 4))
    wanted = rng.sample(["name", *told], rng.randint(1, len(told) + 1))
    if rng.random() < 0.5:
        wanted = [f for f in FIELDS if f in wanted]
    if rng.random() < 0.2:
        text = "\n".join(f"{f.capitalize()}: {values[f]}" for f in ["name", *told])
    else:
        clauses = [rng.choice(FIELDS[f]).format(v=values[f], a=article(str(values[f])))
                   for f in told]  # fmt: skip
        body = ", ".join(clauses[:-1]) + " and " + clauses[-1] if clauses[1:] else clauses[0]
        text = f"{values['name']} {body}."
    listed = ", ".join(wanted[:-1]) + " and " + wanted[-1] if wanted[1:] else wanted[0]
    answer = json.dumps({f: values[f] for f in wanted})
    key = "extract " + " ".join(str(values[f]) for f in ["name", *told])
    return ask("extract", key, pick(rng, EXTRACT).format(f=listed, t=text), answer,
               f"The fields are {listed}.")  # fmt: skip
