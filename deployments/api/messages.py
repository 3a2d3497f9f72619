"""The chat API's messages: those that come in, and the answer made of a model's text."""

import json
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from deployments.api.tools import FunctionName
from deployments.parsing import Arguments, CallStart, Content, OutputParser, Piece, Reasoning
from engine.strict import StrictModel

# Fields of an answer that clients send back as they got them: harmless while they say nothing.
_ECHOED = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content")


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class CalledFunction(StrictModel):
    name: FunctionName
    arguments: str = Field(description="JSON, as the model wrote it.")


class ToolCall(StrictModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        """Templates write arguments as JSON, so they take them parsed, if they can be."""
        arguments: Any = self.function.arguments
        try:
            parsed = json.loads(arguments or "{}")
            arguments = parsed if isinstance(parsed, dict) else arguments
        except (ValueError, RecursionError):
            pass
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = Field(
        None, description="May only be missing beside tool_calls or reasoning_content."
    )
    name: str | None = None
    reasoning_content: str | None = Field(None, description="Of an assistant: what it thought.")
    tool_calls: list[ToolCall] | None = Field(None, min_length=1, description="Of an assistant.")
    tool_call_id: str | None = Field(None, description="Of a tool: the call it answers.")

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_echoes(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if not (name in _ECHOED and (value is None or value == []))
        }

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> "Message":
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content is not None):
            raise ValueError("tool_calls and reasoning_content are for messages of the assistant")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id: messages of a tool need it, others cannot have it")
        may_be_empty = self.tool_calls or self.reasoning_content is not None
        if self.content is None and not may_be_empty:
            raise ValueError("content: Field required")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: text in one string, and no newer role names."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or "",
        }
        if self.tool_calls:
            message["tool_calls"] = [call.for_template() for call in self.tool_calls]
        for name in ("name", "reasoning_content", "tool_call_id"):
            value = getattr(self, name)
            if value is not None:
                message[name] = value
        return message


class AnswerParser:
    """One choice's text as the fields of an assistant's message, whole or in deltas."""

    def __init__(self, parser: OutputParser | None = None) -> None:
        """
        Args:
            parser: None when the text is all content.
        """
        self._parser = parser

    def pieces(self, text: str, last: bool) -> list[Piece]:
        """What this text makes certain; all that is left if it is the `last`."""
        if self._parser is None:
            return [Content(text)] if text else []
        return self._parser.push(text, last)

    @staticmethod
    def message(pieces: Iterable[Piece]) -> dict[str, Any]:
        """The whole answer."""
        content, reasoning = "", ""
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            match piece:
                case Content(part):
                    content += part
                case Reasoning(part):
                    reasoning += part
                case CallStart(_, call_id, name):
                    function = {"name": name, "arguments": ""}
                    calls.append({"id": call_id, "type": "function", "function": function})
                case Arguments(index, part):
                    calls[index]["function"]["arguments"] += part
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not calls else None,
            "refusal": None,
        }
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's name for an end at which tools are called."""
        called = self._parser is not None and self._parser.num_calls > 0
        return "tool_calls" if called and reason == "stop" else reason

    @property
    def is_over(self) -> bool:
        """Whether the text can be cut here: the one call that is allowed is complete."""
        return self._parser is not None and self._parser.is_over

    @staticmethod
    def delta(piece: Piece) -> dict[str, Any]:
        """A piece as the `delta` object of a stream."""
        match piece:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text}
            case CallStart(index, call_id, name):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
                return {"tool_calls": [call]}
            case Arguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
