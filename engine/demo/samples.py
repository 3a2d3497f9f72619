"""One training or evaluation conversation, and the split between the two."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]

HELD_OUT_PERCENT = 8


@dataclass(frozen=True)
class Sample:
    """Messages that end with a question, and the reply the model should give.

    `key` names the instance itself (for instance `add 17 25`) whatever the phrasing; the split
    between training and held-out data is made on it.
    """

    kind: str
    key: str
    messages: list[Message]
    answer: str
    thought: str
    tools: list[Tool] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    thinking: bool = False

    @property
    def expected(self) -> str:
        """The whole assistant text, with the thinking block if thinking is enabled."""
        if not self.thinking:
            return self.answer
        return f"<think>\n{self.thought}\n</think>\n\n{self.answer}"


def is_held_out(key: str) -> bool:
    """Whether an instance belongs to the evaluation data: a stable hash of its key decides."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def ask(kind: str, key: str, question: str, answer: str, thought: str) -> Sample:
    """A sample of a single user turn."""
    return Sample(kind, key, [{"role": "user", "content": question}], answer, thought)


def call_text(calls: Sequence[dict[str, Any]]) -> str:
    """Tool calls as the model writes them (and as the chat template renders them)."""
    return "\n".join(
        f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls
    )


def article(noun: str) -> str:
    """The noun with its indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def pick(rng: random.Random, options: Sequence[str]) -> str:
    """One of the options; earlier ones are a little more likely."""
    return options[min(rng.randrange(len(options)), rng.randrange(len(options) + 2))]
