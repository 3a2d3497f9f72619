"""The Responses API's input items, and the messages of a chat that they are."""

import base64
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from deployments.api.schema.responses.tools import TEXT_ARGUMENT, full_name
from deployments.api.schema.turns import Turns
from engine.text.messages import (
    CacheBreakpoint,
    CalledFunction,
    FunctionName,
    Message,
    NotLookedAt,
    RefusalPart,
    TextPart,
    ToolCall,
)
from engine.text.request_model import NotServed, RequestModel, Unserved

_SEAL = "manta1:"


class _Item(RequestModel):
    id: str | None = Field(None, description="Of an output item that comes back; not looked at.")
    status: str | None = Field(None, description="The same.")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """Clients send output items back with every field that they know."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class InputPart(RequestModel):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: NotLookedAt = None
    logprobs: NotLookedAt = None
    prompt_cache_breakpoint: CacheBreakpoint = None
    cache_control: NotLookedAt = None
    parsed: NotLookedAt = None


def _type_of_part(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return "text" if kind in ("input_text", "output_text", "text") else kind


Part = Annotated[
    Annotated[InputPart, Tag("text")] | Annotated[RefusalPart, Tag("refusal")],
    Discriminator(
        _type_of_part,
        custom_error_type="part_type",
        custom_error_message="a part is of type input_text, output_text or refusal; images, audio "
        "and files are not read here",
    ),
]
Parts = list[Part]


def _text(content: str | Parts) -> str | list[TextPart]:
    if isinstance(content, str):
        return content
    return [TextPart(type="text", text=part.text) for part in content]


class InputMessage(_Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Parts
    phase: str | None = Field(None, description="Of an output item that comes back.")


class _OfACall(_Item):
    call_id: str
    caller: Annotated[None, NotServed({"type": "direct"})] = None
    is_async: Unserved = Field(None, alias="async")
    namespace: str | None = None


class FunctionCall(_OfACall):
    type: Literal["function_call"]
    name: FunctionName
    arguments: str
    parsed_arguments: NotLookedAt = None

    def as_call(self) -> ToolCall:
        name = full_name(self.name, self.namespace)
        function = CalledFunction(name=name, arguments=self.arguments)
        return ToolCall(id=self.call_id, function=function)


class CustomToolCall(_OfACall):
    type: Literal["custom_tool_call"]
    name: FunctionName
    input: str

    def as_call(self) -> ToolCall:
        name = full_name(self.name, self.namespace)
        function = {"name": name, "arguments": {TEXT_ARGUMENT: self.input}}
        return ToolCall(id=self.call_id, function=CalledFunction.model_validate(function))


class CallOutput(_OfACall):
    type: Literal["function_call_output", "custom_tool_call_output"]
    output: str | Parts
    name: str | None = None


class ReasoningPart(RequestModel):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class Reasoning(_Item):
    type: Literal["reasoning"]
    summary: list[ReasoningPart] = Field(
        default_factory=list, description="Stands for content where there is none."
    )
    content: list[ReasoningPart] = Field(default_factory=list)
    encrypted_content: str | None = Field(
        None, description="The thoughts once more, for clients that drop the others."
    )

    @property
    def text(self) -> str:
        own = opened(self.encrypted_content or "")
        if own is not None and not self.content:
            return own
        separator, parts = ("", self.content) if self.content else ("\n\n", self.summary)
        return separator.join(part.text for part in parts)


def sealed(thoughts: str) -> str:
    """As `encrypted_content`. Nothing in it is secret: the thoughts are beside it."""
    return _SEAL + base64.b64encode(thoughts.encode()).decode()


def opened(content: str) -> str | None:
    """The thoughts in it; None if another server has made it."""
    if not content.startswith(_SEAL):
        return None
    try:
        return base64.b64decode(content.removeprefix(_SEAL), validate=True).decode()
    except ValueError:
        return None


def _type_of(item: Any) -> str | None:
    """A message may leave its type out."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    if kind in ("function_call_output", "custom_tool_call_output"):
        return "output"
    return "message" if kind is None else kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[CustomToolCall, Tag("custom_tool_call")]
    | Annotated[CallOutput, Tag("output")]
    | Annotated[Reasoning, Tag("reasoning")],
    Discriminator(
        _type_of,
        custom_error_type="item_type",
        custom_error_message="type must be message, function_call, function_call_output, "
        "custom_tool_call, custom_tool_call_output or reasoning",
    ),
]


def to_messages(items: list[InputItem]) -> list[Message]:
    turns = Turns()
    for item in items:
        match item:
            case Reasoning():
                turns.think(item.text)
            case InputMessage(role="assistant"):
                turns.say(_text(item.content))
            case FunctionCall() | CustomToolCall():
                turns.call(item.as_call())
            case CallOutput():
                answer = {"tool_call_id": item.call_id, "name": item.name}
                turns.add("tool", _text(item.output), **answer)
            case InputMessage():
                turns.add(item.role, _text(item.content))
    return turns.messages
