"""The chat API's messages: those that come in, and the answer made of a model's text."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from deployments.api.request_model import NotServed, RequestModel, Unserved
from deployments.api.tools import FunctionName
from deployments.parsing import Arguments, CallStart, Content, OutputParser, Piece, Reasoning

# Of a prompt's part: where a cached prefix should end. Every block of a prompt may be such an end.
CacheBreakpoint = Annotated[None, NotServed({"mode": "explicit"})]


class TextPart(RequestModel):
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: CacheBreakpoint = None


class RefusalPart(RequestModel):
    type: Literal["refusal"]
    refusal: str = Field(description="Of an assistant: what it said instead of an answer.")

    @property
    def text(self) -> str:
        return self.refusal


class CalledFunction(RequestModel):
    name: FunctionName
    arguments: str = Field(description="JSON, as the model wrote it.")
    parsed_arguments: Any = Field(None, description="Of OpenAI's clients; not looked at.")


class ToolCall(RequestModel):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = Field(None, description="As streams have it; not looked at.")

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


class Message(RequestModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Annotated[TextPart | RefusalPart, Field(discriminator="type")]] | None = (
        Field(None, description="May only be missing beside what an assistant says otherwise.")
    )
    name: str | None = None
    refusal: str | None = Field(
        None, description="Of an assistant: what it said instead of an answer."
    )
    reasoning_content: str | None = Field(None, description="Of an assistant: what it thought.")
    tool_calls: list[ToolCall] = Field(default_factory=list, description="Of an assistant.")
    tool_call_id: str | None = Field(None, description="Of a tool: the call it answers.")
    parsed: Any = Field(None, description="Of OpenAI's clients: content once more; not looked at.")
    annotations: Unserved = None
    audio: Unserved = None
    function_call: Unserved = None

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> "Message":
        of_assistant = ("tool_calls", "reasoning_content", "refusal")
        given = [name for name in of_assistant if getattr(self, name) not in (None, [])]
        if given and self.role != "assistant":
            raise ValueError(f"{given[0]}: only messages of the assistant have it")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id: messages of a tool need it, others cannot have it")
        if self.content is None and not given:
            raise ValueError("content: Field required")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: text in one string, and no newer role names."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": content or self.refusal or "",
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

    def __init__(self, parser: OutputParser | None = None, endings: tuple[str, ...] = ()) -> None:
        """
        Args:
            parser: None when the text is all content.
            endings: texts of end tokens, which are in the text when special tokens are.
        """
        self._parser = parser
        self._endings = endings

    def pieces(self, text: str, last: bool) -> list[Piece]:
        """What this text makes certain; all that is left if it is the `last`."""
        if self._parser is None:
            return [Content(text)] if text else []
        if last:
            for ending in self._endings:
                text = text.removesuffix(ending)
        return self._parser.push(text, last)

    def message(self, text: str) -> dict[str, Any]:
        """The whole answer."""
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if self._parser is None:
            return message
        content, reasoning = "", ""
        calls: list[dict[str, Any]] = []
        for piece in self.pieces(text, last=True):
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
        message["content"] = content if content or not calls else None
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
