"""Requests that once cost others something: each is refused, or costs its sender alone."""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx

MB = 1 << 20


def attacks(prompt: str = "apple river stone ") -> Iterator[tuple[str, str, bytes]]:
    """(name, path, body)"""

    def of(name: str, path: str, body: dict[str, Any]) -> tuple[str, str, bytes]:
        return name, path, json.dumps(body).encode()

    completions, chat = "/v1/completions", "/v1/chat/completions"
    short = {"prompt": "a", "max_tokens": 2}
    huge = {"type": "integer", "minimum": 10**30}
    message = {"role": "user", "content": "a"}
    tool = {"type": "function", "function": {"name": "f", "parameters": huge}}
    yield of("a long bad word", completions, short | {"bad_words": [prompt * 60]})
    many = {"bad_words": ["a b"] * 256, "bad_words_token_ids": [[5]] * 1024}
    yield of("many bad words", completions, short | many)
    yield of("a huge number", completions, short | {"guided_json": huge})
    yield of("a huge number in a tool", chat, {"messages": [message], "tools": [tool]})
    ones = b"1," * (MB // 2)
    yield "a token that is none", completions, b'{"prompt":[' + ones + b'"a"]}'
    yield "messages that are none", chat, b'{"messages":[' + ones[: 400 * 1024] + b"1]}"
    unknown = {f"field_{i}": i for i in range(10_000)}
    yield of("unknown fields", completions, short | unknown)
    yield "a deep body", completions, b'{"prompt":' + b"[" * MB + b"]" * MB + b"}"
    yield of("a long prompt", completions, short | {"prompt": prompt * 17_000})
    yield of("a long text to tokenize", "/tokenize", {"prompt": prompt * (4 * MB // len(prompt))})
    yield of("many tokens to write out", "/detokenize", {"tokens": [7] * 1_000_000})
    for prompts in (16, 8):
        many = {"prompt": ["a"] * prompts, "n": 128, "max_tokens": 2}
        yield of(f"{prompts * 128} choices", completions, many)
    logprobs = {
        "n": 32,
        "max_tokens": 200,
        "ignore_eos": True,
        "logprobs": True,
        "top_logprobs": 20,
    }
    yield of("many log-probabilities", chat, {"messages": [message], **logprobs})


async def attack(url: str, until: float, answers: Counter[str]) -> None:
    """Sends them in random order, two at a time, and counts the answers by attack and status."""
    draw, known = random.Random(0), list(attacks())

    async def attacker(http: httpx.AsyncClient) -> None:
        while time.monotonic() < until:
            name, path, body = draw.choice(known)
            headers = {"content-type": "application/json"}
            try:
                response = await http.post(url + path, content=body, headers=headers)
                answers[f"{name}: {response.status_code}"] += 1
            except httpx.HTTPError as error:
                answers[f"{name}: {type(error).__name__}"] += 1

    async with httpx.AsyncClient(timeout=120) as http, asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(attacker(http))


def main() -> None:
    url, seconds = sys.argv[1], float(sys.argv[2])
    answers: Counter[str] = Counter()
    asyncio.run(attack(url, time.monotonic() + seconds, answers))
    print(
        "hostile clients were told:",
        *(f"  {n} x {a}" for a, n in sorted(answers.items())),
        sep="\n",
    )


if __name__ == "__main__":
    main()
