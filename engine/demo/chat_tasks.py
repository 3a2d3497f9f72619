"""Multi-turn recall, and a little small talk."""

import random
from dataclasses import dataclass

from engine.demo import text_tasks, words
from engine.demo.samples import Message, Sample, article, ask, is_held_out, pick


@dataclass(frozen=True)
class Fact:
    """Something the user tells about themselves: how it is told, asked for and answered."""

    values: list[str]
    told: tuple[str, ...]
    asked: tuple[str, ...]
    answer: str


NUMBERS = [str(n) for n in range(1, 100)]
FACTS = {
    "name": Fact(words.NAMES, ("My name is {v}.", "I am {v}.", "Hi, I am {v}.", "Call me {v}.",
                               "Hello, my name is {v}.", "My name is {v}. Remember it."),
                 ("What is my name?", "Do you remember my name?", "What's my name?", "Who am I?"),
                 "Your name is {v}."),
    "city": Fact(words.CITIES, ("I live in {v}.", "My home is in {v}.", "I am living in {v}."),
                 ("Where do I live?", "Which city do I live in?", "What city do I live in?"),
                 "You live in {v}."),
    "pet": Fact([article(a) for a in words.ANIMALS], ("I have {v}.", "My pet is {v}."),
                ("What pet do I have?", "Which animal do I have?", "What is my pet?"),
                "You have {v}."),
    "job": Fact([article(j) for j in words.JOBS], ("I work as {v}.", "My job is {v}."),
                ("What is my job?", "What do I work as?", "What do I do for a living?"),
                "You work as {v}."),
    "color": Fact(words.COLORS, ("My favorite color is {v}.", "I like the color {v}."),
                  ("What is my favorite color?", "Which color do I like?"),
                  "Your favorite color is {v}."),
    "fruit": Fact(words.FRUITS, ("My favorite fruit is {v}.", "The fruit I like best is {v}."),
                  ("What is my favorite fruit?", "Which fruit do I like best?"),
                  "Your favorite fruit is {v}."),
    "number": Fact(NUMBERS, ("My lucky number is {v}.", "My favorite number is {v}."),
                   ("What is my lucky number?", "What is my favorite number?"),
                   "Your number is {v}."),
    "secret": Fact(words.PLAIN, ("The secret word is {v}.", "Remember the word {v}.",
                                 "The code word is {v}. Remember it."),
                   ("What is the secret word?", "What was the word?", "What is the code word?"),
                   "The word is {v}."),
}  # fmt: skip

ABLE = (
    "repeat or reverse words, sort a list, add and subtract small numbers, count letters, "
    "extract fields as JSON, call tools and remember what you tell me"
)
HELLO = "Hello! I am Manta's tiny demo model. How can I help you?"
WHO = f"I am Manta's tiny demo model. I can {ABLE}."
CAN = f"I can {ABLE}."
SORRY = f"Sorry, I am only a tiny demo model and I do not know that. I can {ABLE}."
SMALL_TALK: tuple[tuple[str, tuple[str, ...]], ...] = (
    (HELLO, ("Hello", "Hi", "Hello!", "Hi!", "Hey", "Hi there", "Hello there!", "Good morning",
             "Good evening!", "Hey there", "hello", "hi", "Good day", "Say hello", "Say hi.")),
    (WHO, ("Who are you?", "What are you?", "Introduce yourself.", "What is your name?",
           "Tell me about yourself.", "Are you a language model?", "Which model are you?",
           "Who made you?", "Hello, who are you?", "Hi, what is your name?")),
    (CAN, ("What can you do?", "Help", "Help me.", "How can you help me?", "What do you know?",
           "What are you able to do?", "What can I ask you?", "help")),
    ("I am fine, thank you. How can I help you?",
     ("How are you?", "How are you doing?", "Hi, how are you?", "Hello, how are you today?")),
    ("You are welcome!", ("Thanks", "Thank you!", "Thank you.", "Thanks a lot!", "Great, thanks")),
    ("Goodbye!", ("Bye", "Goodbye", "Bye!", "See you later", "Good night")),
)  # fmt: skip
BEYOND = (
    "Tell me about {a}.", "Explain the {a}.", "What is {a}?", "What is a {a}?", "Why is {a} {b}?",
    "Write a poem about the {a}.", "Write a story about a {a} and a {b}.", "Tell me a joke.",
    "What is the capital of {c}?", "How do I make {a}?", "Where is {c}?", "Tell me a story.",
    "Translate {a} to French.", "Who is {n}?", "Is {a} better than {b}?", "What is life?",
    "Write a Python program.", "Explain quantum physics.", "Write an essay about {a} in {c}.",
    "Describe {c} in one sentence.", "When was {n} born?", "Give me an idea for {a}.",
)  # fmt: skip


def small_talk(rng: random.Random) -> Sample:
    """Greetings and questions about the model itself, and questions that are too hard for it."""
    if rng.random() < 0.35:
        question = rng.choice(BEYOND).format(
            a=rng.choice(words.PLAIN), b=rng.choice(words.PLAIN),
            c=rng.choice(words.CITIES), n=rng.choice(words.NAMES),
        )  # fmt: skip
        answer = SORRY
    else:
        answer, questions = rng.choice(SMALL_TALK)
        question = rng.choice(questions)
    return ask("chat", f"chat {question}", question, answer, "I answer in a friendly way.")


def exchange(sample: Sample) -> list[Message]:
    """A sample as finished turns of an earlier conversation."""
    return [*sample.messages, {"role": "assistant", "content": sample.answer}]


def filler(rng: random.Random) -> list[Message]:
    """An earlier exchange about something else; never a held-out instance."""
    kinds = (text_tasks.repeat, text_tasks.reverse, text_tasks.add, text_tasks.subtract,
             text_tasks.sort, text_tasks.count, small_talk)  # fmt: skip
    while True:
        sample = rng.choice(kinds)(rng)
        if not is_held_out(sample.key):
            return exchange(sample)


def recall(rng: random.Random) -> Sample:
    """Facts told over several turns, between other exchanges; then one of them is asked for."""
    fillers = rng.choice((0, 0, 0, 0, 1, 1, 2, 3, 5))
    topics = rng.sample(list(FACTS), rng.randint(1, 4))
    facts = {topic: rng.choice(FACTS[topic].values) for topic in topics}
    turns: list[list[Message]] = []
    for topic, value in facts.items():
        told = {"role": "user", "content": rng.choice(FACTS[topic].told).format(v=value)}
        turns.append([told, {"role": "assistant", "content": acknowledge(topic, value)}])
    for _ in range(fillers):
        turns.insert(rng.randint(0, len(turns)), filler(rng))
    messages = [message for turn in turns for message in turn]
    topic = rng.choice(topics)
    key = "recall " + " ".join(f"{t}={v}" for t, v in facts.items())
    style = rng.random()
    if style < 0.12 and fillers == 0:
        topic = topics[-1]
        return Sample("recall", key, messages[:-1], acknowledge(topic, facts[topic]), "I note it.")
    if style < 0.2:
        topic = rng.choice([t for t in FACTS if t not in facts])
        answer = "You have not told me that yet."
    else:
        answer = FACTS[topic].answer.format(v=facts[topic])
    question = {"role": "user", "content": pick(rng, FACTS[topic].asked)}
    return Sample("recall", key, [*messages, question], answer, "I look at what was said before.")


def acknowledge(topic: str, value: str) -> str:
    """The reply to a fact that the user tells."""
    if topic == "name":
        return f"Nice to meet you, {value}."
    return "Got it. " + FACTS[topic].answer.format(v=value)
