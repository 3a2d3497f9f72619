"""The kinds of conversation the demo model is trained on, and how samples are drawn.

Every sample has a key that names its instance; a stable hash of the key decides whether it is
held out for evaluation, so that no instance is in both sets, whatever its phrasing.
"""

import dataclasses
import random
from collections.abc import Callable

from engine.demo import chat_tasks, text_tasks, tool_tasks, words
from engine.demo.samples import Message, Sample, is_held_out

REASONED = (text_tasks.add, text_tasks.subtract, text_tasks.count, text_tasks.sort)


def think(rng: random.Random) -> Sample:
    """Arithmetic, counting or sorting with thinking enabled."""
    sample = rng.choice(REASONED)(rng)
    return dataclasses.replace(sample, kind="think", thinking=True)


KINDS: dict[str, Callable[[random.Random], Sample]] = {
    "repeat": text_tasks.repeat,
    "reverse": text_tasks.reverse,
    "sort": text_tasks.sort,
    "add": text_tasks.add,
    "subtract": text_tasks.subtract,
    "count": text_tasks.count,
    "extract": text_tasks.extract,
    "tool call": tool_tasks.tool_call,
    "tool answer": tool_tasks.tool_answer,
    "think": think,
    "recall": chat_tasks.recall,
}
"""The kinds that are evaluated on held-out instances."""

WEIGHTS = {
    "repeat": 8, "reverse": 8, "sort": 14, "add": 11, "subtract": 16, "count": 14, "extract": 5,
    "tool call": 8, "tool answer": 3, "think": 13, "recall": 4, "chat": 3,
}  # fmt: skip
"""How often training draws each kind. Small talk has fixed answers and is not evaluated."""

SYSTEM = (
    "You are a helpful assistant.", "You are a helpful assistant.", "You are Manta's demo model.",
    "Answer briefly.", "Be concise.", "You are a pirate.", "You are a friendly chat bot.",
)  # fmt: skip


def draw(kind: str, rng: random.Random, held_out: bool, thinking: bool | None = None) -> Sample:
    """A sample of one kind from one side of the split, with its surroundings varied.

    `thinking` None draws it: in training, every kind is sometimes seen with thinking enabled.
    """
    make = chat_tasks.small_talk if kind == "chat" else KINDS[kind]
    while True:
        sample = make(rng)
        if kind == "chat" or is_held_out(sample.key) == held_out:
            break
    if not sample.thinking:
        on = rng.random() < 0.12 if thinking is None else thinking
        sample = dataclasses.replace(sample, thinking=on)
    return surround(sample, rng)


def surround(sample: Sample, rng: random.Random) -> Sample:
    """Sometimes add a system prompt, earlier exchanges, or tools that are not needed."""
    messages, tools = sample.messages, sample.tools
    if sample.kind != "recall" and rng.random() < 0.15:
        messages = chat_tasks.filler(rng) + messages
    if rng.random() < 0.4:
        messages = [system_prompt(rng), *messages]
    if sample.kind in ("repeat", "reverse", "extract", "chat") and rng.random() < 0.06:
        tools = tool_tasks.declared(rng, tool_tasks.request(rng))
    return dataclasses.replace(sample, messages=messages, tools=tools)


def system_prompt(rng: random.Random) -> Message:
    """A usual system prompt, or one that says something irrelevant."""
    content = rng.choice(SYSTEM)
    if rng.random() < 0.3:
        content = "You are " + " ".join(rng.sample(words.PLAIN, rng.randint(2, 12))) + "."
    return {"role": "system", "content": content}


def training_sample(rng: random.Random) -> Sample:
    """A sample of any kind, from the training side."""
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    return draw(kind, rng, held_out=False)
