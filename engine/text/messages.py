"""Messages and tools as the OpenAI API has them, and as chat templates take them."""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from engine.strict import StrictModel, explain
from engine.text.request_model import NotServed, RequestModel, Unserved

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,128}$")]
# Of a prompt's part: where a cached prefix should end. Every block of a prompt may be such an end.
CacheBreakpoint = Annotated[None, NotServed({"mode": "explicit"})]
# What clients add to an answer, or keep of another server's, and send back with it.
NotLookedAt = Annotated[Any, Field(description="Of clients; not looked at.")]


class _Cacheable(RequestModel):
    cache_control: NotLookedAt = None


class TextPart(_Cacheable):
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
    arguments: str = Field(description="JSON, as the model wrote it; or the object that it says.")
    parsed_arguments: Any = Field(None, description="Of OpenAI's clients; not looked at.")

    @field_validator("arguments", mode="before")
    @classmethod
    def _written(cls, value: Any) -> Any:
        return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


def _type_of_part(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return kind if isinstance(kind, str) else None


Part = Annotated[
    Annotated[TextPart, Tag("text")] | Annotated[RefusalPart, Tag("refusal")],
    Discriminator(
        _type_of_part,
        custom_error_type="part_type",
        custom_error_message="a part is of type text or refusal; images, audio and files are not "
        "read here",
    ),
]


class ToolCall(_Cacheable):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: NotLookedAt = None
    provider_specific_fields: NotLookedAt = None
    extra_content: NotLookedAt = None

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


_OTHER_ROLES = {"developer": "system", "function": "tool"}  # newer and older than templates
_THOUGHTS = ("reasoning_content", "reasoning")


class Message(_Cacheable):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = Field(
        None, description="Of an assistant it may be null; missing beside what else it says."
    )
    name: str | None = None
    refusal: str | None = Field(
        None, description="Of an assistant: what it said instead of an answer."
    )
    reasoning_content: str | None = Field(None, description="Of an assistant: what it thought.")
    reasoning: str | None = Field(
        None, description="Another name for it, which is not read beside."
    )
    tool_calls: list[ToolCall] = Field(default_factory=list, description="Of an assistant.")
    tool_call_id: str | None = Field(None, description="Of a tool: the call it answers.")
    function_call: CalledFunction | None = Field(None, description="An older way to call one.")
    parsed: NotLookedAt = None
    annotations: NotLookedAt = None
    id: NotLookedAt = None
    provider_specific_fields: NotLookedAt = None
    thinking_blocks: NotLookedAt = None
    audio: Unserved = None

    @model_validator(mode="before")
    @classmethod
    def _may_have_said_nothing(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("role") == "assistant" and "content" in data:
            return data | {"content": "" if data["content"] is None else data["content"]}
        return data

    @model_validator(mode="after")
    def _fields_fit_the_role(self) -> "Message":
        of_assistant = (*("tool_calls", "function_call", "refusal"), *_THOUGHTS)
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
        """Characters of its text."""
        parts = self.content if isinstance(self.content, list) else ()
        return len(self.content or "") + sum(len(part.text) for part in parts)

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: text in one string, and no newer role names."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        message: dict[str, Any] = {
            "role": _OTHER_ROLES.get(self.role, self.role),
            "content": content or self.refusal or "",
        }
        calls = self.tool_calls
        if self.function_call is not None:
            calls = [*calls, ToolCall(id=self.function_call.name, function=self.function_call)]
        if calls:
            message["tool_calls"] = [call.for_template() for call in calls]
        thoughts = self.reasoning if self.reasoning_content is None else self.reasoning_content
        named = {"name": self.name, "tool_call_id": self.tool_call_id, _THOUGHTS[0]: thoughts}
        return message | {name: value for name, value in named.items() if value is not None}


class Function(RequestModel):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(
        None, description="JSON schema of the arguments; default: there are none."
    )
    strict: bool | None = Field(
        None,
        description="Whether a call that the model makes of itself is held to the schema, as "
        "forced ones are.",
    )


class Tool(_Cacheable):
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
