"""Messages and tools as the OpenAI API has them, and as chat templates take them."""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from engine.strict import StrictModel, explain

# Fields of an answer that clients send back as they got them: harmless while they say nothing.
_ECHOED = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content")

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


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


class Function(StrictModel):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="JSON schema of the arguments; default: there are none."
    )
    strict: bool | None = Field(
        None, description="Taken for its name: forced calls are always strict, others never."
    )


class Tool(StrictModel):
    type: Literal["function"] = "function"
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: nothing that was not said."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": function}


class _Chat(StrictModel):
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool]


def for_template(
    messages: Iterable[Mapping[str, Any]], tools: Iterable[Mapping[str, Any]] | None = None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(messages, tools) as chat templates take them; raises ValueError for what they cannot be."""
    try:
        chat = _Chat.model_validate({"messages": list(messages), "tools": list(tools or ())})
    except ValidationError as error:
        faults = (f"{field}: {fault}" for field, fault in explain(error.errors()))
        raise ValueError("; ".join(faults)) from error
    return [m.for_template() for m in chat.messages], [t.for_template() for t in chat.tools]
