"""The Responses API's input items, and the messages of a chat that they are."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from engine.strict import StrictModel
from engine.text.messages import CalledFunction, FunctionName, Message, TextPart, ToolCall


class _Item(StrictModel):
    id: str | None = Field(None, description="Of an output item that comes back; not looked at.")
    status: str | None = Field(None, description="The same.")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        """Clients send output items back with every field that they know."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class InputPart(StrictModel):
    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] = Field(default_factory=list, max_length=0)
    logprobs: list[Any] | None = Field(None, max_length=0)


class InputMessage(_Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]

    @property
    def text(self) -> str | list[TextPart]:
        if isinstance(self.content, str):
            return self.content
        return [TextPart(type="text", text=part.text) for part in self.content]


class FunctionCall(_Item):
    type: Literal["function_call"]
    call_id: str
    name: FunctionName
    arguments: str


class FunctionCallOutput(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: str


class ReasoningPart(StrictModel):
    type: Literal["reasoning_text"]
    text: str


class Reasoning(_Item):
    type: Literal["reasoning"]
    summary: list[Any] = Field(default_factory=list, max_length=0)
    content: list[ReasoningPart] = Field(default_factory=list)


def _type_of(item: Any) -> str | None:
    """A message may leave its type out."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")],
    Discriminator(_type_of),
]


def to_messages(items: list[InputItem]) -> list[Message]:
    """Thoughts, words and calls of the assistant in a row are one message."""
    messages: list[Message] = []
    turn: dict[str, Any] = {}  # of the assistant, so far

    def end_turn() -> None:
        if turn:
            messages.append(Message(role="assistant", **turn))
            turn.clear()

    for item in items:
        match item:
            case Reasoning():
                end_turn()
                turn["reasoning_content"] = "".join(part.text for part in item.content)
            case InputMessage(role="assistant"):
                if "content" in turn or "tool_calls" in turn:
                    end_turn()
                turn["content"] = item.text
            case FunctionCall():
                function = CalledFunction(name=item.name, arguments=item.arguments)
                turn.setdefault("tool_calls", []).append(
                    ToolCall(id=item.call_id, function=function)
                )
            case FunctionCallOutput():
                end_turn()
                messages.append(
                    Message(role="tool", tool_call_id=item.call_id, content=item.output)
                )
            case InputMessage():
                end_turn()
                messages.append(Message(role=item.role, content=item.text))
    end_turn()
    return messages
