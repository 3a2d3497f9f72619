"""The Responses API's input items, and the messages of a chat that they are."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from deployments.api.schema.turns import Turns
from engine.text.messages import (
    CacheBreakpoint,
    CalledFunction,
    FunctionName,
    Message,
    RefusalPart,
    TextPart,
    ToolCall,
)
from engine.text.request_model import NotServed, RequestModel, Unserved


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
    type: Literal["input_text", "output_text"]
    text: str
    annotations: Unserved = None
    logprobs: Unserved = None
    prompt_cache_breakpoint: CacheBreakpoint = None
    parsed: Any = Field(None, description="Of OpenAI's clients; not looked at.")


Parts = list[Annotated[InputPart | RefusalPart, Field(discriminator="type")]]


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
    namespace: Unserved = None


class FunctionCall(_OfACall):
    type: Literal["function_call"]
    name: FunctionName
    arguments: str
    parsed_arguments: Any = Field(None, description="Of OpenAI's clients; not looked at.")
    is_async: Unserved = Field(None, alias="async")


class FunctionCallOutput(_OfACall):
    type: Literal["function_call_output"]
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
    encrypted_content: Unserved = None

    @property
    def text(self) -> str:
        separator, parts = ("", self.content) if self.content else ("\n\n", self.summary)
        return separator.join(part.text for part in parts)


def _type_of(item: Any) -> str | None:
    """A message may leave its type out."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if kind is None else kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")],
    Discriminator(
        _type_of,
        custom_error_type="item_type",
        custom_error_message="type must be message, function_call, function_call_output or "
        "reasoning",
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
            case FunctionCall():
                function = CalledFunction(name=item.name, arguments=item.arguments)
                turns.call(ToolCall(id=item.call_id, function=function))
            case FunctionCallOutput():
                answer = {"tool_call_id": item.call_id, "name": item.name}
                turns.add("tool", _text(item.output), **answer)
            case InputMessage():
                turns.add(item.role, _text(item.content))
    return turns.messages
