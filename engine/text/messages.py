"""Messages and tools as the OpenAI API has them, and as chat templates take them."""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from engine.strict import StrictModel, explain
from engine.text.request_model import NotServed, RequestModel, Unserved

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
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

    @property
    def size(self) -> int:
        """In characters."""
        parts = self.content if isinstance(self.content, list) else ()
        return len(self.content or "") + sum(len(part.text) for part in parts)

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


class Function(RequestModel):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="JSON schema of the arguments; default: there are none."
    )
    strict: bool | None = Field(
        None, description="Taken for its name: forced calls are always strict, others never."
    )


class Tool(RequestModel):
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
