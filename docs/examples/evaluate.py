"""Batch evaluation: thousands of questions in one call, and a table of what was right.

python docs/examples/evaluate.py --questions 2000
"""

import argparse
import random
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from engine import LLM, SamplingParams

Question = tuple[str, str]  # and its answer
WORDS = ["apple", "river", "stone", "cloud", "house", "tree", "bread", "light"]


def add(rng: random.Random) -> Question:
    a, b = rng.randrange(50), rng.randrange(50)
    return f"What is {a} + {b}?", str(a + b)


def repeat(rng: random.Random) -> Question:
    words = " ".join(rng.sample(WORDS, rng.randint(2, 6)))
    return f"Repeat these words: {words}", words


def reverse(rng: random.Random) -> Question:
    words = rng.sample(WORDS, rng.randint(2, 5))
    return f"Reverse these words: {' '.join(words)}", " ".join(reversed(words))


def sort(rng: random.Random) -> Question:
    numbers = rng.sample(range(100), rng.randint(3, 5))
    listed = " ".join(map(str, numbers))
    return f"Sort these numbers in ascending order: {listed}", " ".join(map(str, sorted(numbers)))


TASKS: tuple[Callable[[random.Random], Question], ...] = (add, repeat, reverse, sort)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--model", default="manta-demo")
    args = parser.parse_args()
    rng = random.Random(0)
    asked = [(task.__name__, *task(rng)) for task in rng.choices(TASKS, k=args.questions)]

    llm = LLM(args.model)
    start = time.perf_counter()
    outputs = llm.chat(
        [[{"role": "user", "content": question}] for _, question, _ in asked],
        SamplingParams(temperature=0, max_tokens=48),
    )
    seconds = time.perf_counter() - start

    right: dict[str, list[bool]] = {}
    for (kind, _, answer), output in zip(asked, outputs, strict=True):
        right.setdefault(kind, []).append(output.outputs[0].text.strip() == answer)
    table = Table("task", "questions", "right")
    for kind, found in sorted(right.items()):
        table.add_row(kind, str(len(found)), f"{sum(found) / len(found):.1%}")
    Console().print(table)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    print(
        f"{len(outputs) / seconds:,.0f} questions/s; {cached / prompt:.0%} of the prompts' tokens "
        "came from the prefix cache"
    )


if __name__ == "__main__":
    main()
