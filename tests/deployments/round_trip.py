"""What a chat template writes of an answer, read back as if the model had written it."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from deployments.parsing import (
    Arguments,
    CallStart,
    Content,
    Functions,
    OutputParser,
    Reasoning,
    ReasoningFormat,
    ToolFormat,
    reasoning_format,
    tool_format,
)
from deployments.parsing.reasoning import THINK
from engine.text.chat_template import ChatTemplates

_MARK = "Well, well."
_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|END_OF_TURN_TOKEN|>", "<turn|>", "</s>"),
    *("<|tool_response>", "[e~[", "<|end_of_text|>", "<|eos|>", "<seed:eos>", "<|return|>"),
    *("<｜end▁of▁sentence｜>", "<|end|>\n", "<SPECIAL_12>", "<|user|>", "<|observation|>"),
)
_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_USER = {"role": "user", "content": "What is the weather?"}


@dataclass(frozen=True)
class Answer:
    """An assistant's message: (name, arguments) of its calls."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, dict[str, Any]], ...] = ()

    def __hash__(self) -> int:
        return hash((self.content, self.reasoning, json.dumps(self.calls, sort_keys=True)))

    def message(self, new_id: Callable[[str, int], str]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message |= {"reasoning_content": self.reasoning, "reasoning": self.reasoning}
            message["thinking"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {
                    "id": new_id(name, i),
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                }
                for i, (name, arguments) in enumerate(self.calls)
            ]
        return message


class RoundTrip:
    """A template, and the formats that it gives away."""

    def __init__(self, template: str, functions: list[dict[str, Any]]) -> None:
        self._templates = ChatTemplates({"default": template}, {}, _NAMED, set(), set())
        self._tools = [{"type": "function", "function": function} for function in functions]
        self._functions = Functions(functions)
        self.tools: ToolFormat | None = tool_format("auto", template)
        self.reasoning: ReasoningFormat | None = reasoning_format("auto", template)

    def written(self, answer: Answer) -> tuple[str, str]:
        """(the prompt, what the model would have written behind it)"""
        prompt = self._render([_USER], True)
        new_id = self.tools.new_id if self.tools is not None else lambda name, i: f"call{i:05d}"
        whole = self._render([_USER, answer.message(new_id)], False)
        same = (a == b for a, b in zip(prompt, whole, strict=False))
        shared = prompt[: sum(takewhile(bool, same))]
        if len(shared) < len(prompt):  # it has begun what the answer has not: cut before a mark
            shared = re.sub(r"[<\[][^>\]]*$", "", shared)
        plain = self._render([_USER, {"role": "assistant", "content": _MARK}], False)
        # What ends the turn is a token that ends the output.
        said = whole.removeprefix(shared).removesuffix(plain.rpartition(_MARK)[2])
        if self.reasoning is not None and said.startswith(self.reasoning.close):
            shared, said = shared + self.reasoning.close, said.removeprefix(self.reasoning.close)
        ends = [said.index(end) for end in _ENDS if end in said]
        said = said[: min(ends, default=None)]
        return shared, said

    def _render(self, messages: list[dict[str, Any]], generates: bool) -> str:
        text, separator = self._templates.render(
            messages, tools=self._tools, add_generation_prompt=generates
        )
        return text.replace(separator, "") if separator else text

    def read(self, prompt: str, texts: list[str]) -> Answer:
        """The answer in the pieces of a stream."""
        reasoning = self.reasoning or THINK
        is_open = reasoning.is_open(prompt) if self.reasoning is not None else None
        parser = OutputParser(is_open, self.tools, functions=self._functions, reasoning=reasoning)
        content, thought = "", ""
        calls: list[list[str]] = []
        pieces = [piece for text in texts for piece in parser.push(text, last=False)]
        for piece in pieces + parser.push("", last=True):
            match piece:
                case Content(text):
                    content += text
                case Reasoning(text):
                    thought += text
                case CallStart(_, name):
                    calls.append([name, ""])
                case Arguments(index, text):
                    calls[index][1] += text
        return Answer(content, thought, tuple((name, json.loads(a)) for name, a in calls))
