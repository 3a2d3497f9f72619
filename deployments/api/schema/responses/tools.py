"""The Responses API's tools, and the functions of a chat that they are."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from engine.text.messages import Function, FunctionName, Tool
from engine.text.request_model import NotServed, RequestModel, Unserved

# The one argument of a tool that takes any text.
TEXT_ARGUMENT = "input"
# Tools that OpenAI runs, or whose schemas only its models know.
_HOSTED = re.compile(
    r"(web_search|file_search|code_interpreter|image_generation|computer|mcp|local_shell|shell"
    r"|apply_patch|tool_search|programmatic_tool_calling)[a-z0-9_]{0,32}"
)


class _OwnTool(RequestModel):
    name: FunctionName
    description: str | None = None
    allowed_callers: Annotated[None, NotServed(["direct"])] = None
    defer_loading: bool | None = Field(None, description="Not looked at: all tools are told of.")
    is_async: Unserved = Field(None, alias="async")


class FunctionTool(_OwnTool):
    """The API's functions are flat."""

    type: Literal["function"]
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    output_schema: dict[str, Any] | None = Field(None, description="Not looked at.")

    def function(self) -> Function:
        return Function(**{name: getattr(self, name) for name in Function.model_fields})

    def shown(self) -> dict[str, Any]:
        """As a response has it."""
        return {"type": "function", **self.function().model_dump()}


class _TextFormat(RequestModel):
    type: Literal["text"] = "text"


class _GrammarFormat(RequestModel):
    type: Literal["grammar"]
    syntax: Literal["lark", "regex"]
    definition: str


class CustomTool(_OwnTool):
    """Takes any text. A grammar for it is shown to the model, and not enforced."""

    type: Literal["custom"]
    format: Annotated[_TextFormat | _GrammarFormat, Field(discriminator="type")] = _TextFormat()

    def shown(self) -> dict[str, Any]:
        return self.model_dump(by_alias=True, exclude_unset=True)

    def function(self) -> Function:
        about = [self.description] if self.description else []
        if isinstance(self.format, _GrammarFormat):
            about.append(f"The input's grammar ({self.format.syntax}):\n{self.format.definition}")
        text = {"type": "object", "properties": {TEXT_ARGUMENT: {"type": "string"}}}
        return Function(
            name=self.name,
            description="\n\n".join(about) or None,
            parameters=text | {"required": [TEXT_ARGUMENT], "additionalProperties": False},
        )


OwnTool = Annotated[FunctionTool | CustomTool, Field(discriminator="type")]


class NamespaceTool(RequestModel):
    type: Literal["namespace"]
    name: FunctionName
    description: str | None = None
    tools: list[OwnTool]

    def shown(self) -> dict[str, Any]:
        own = self.model_dump(exclude_unset=True)
        return own | {"tools": [tool.shown() for tool in self.tools]}


def _kind_of_tool(tool: Any) -> str | None:
    kind = tool.get("type") if isinstance(tool, dict) else getattr(tool, "type", None)
    if kind in ("function", "custom", "namespace"):
        return str(kind)
    return "hosted" if isinstance(kind, str) and _HOSTED.fullmatch(kind) else None


AnyTool = Annotated[
    Annotated[FunctionTool, Tag("function")]
    | Annotated[CustomTool, Tag("custom")]
    | Annotated[NamespaceTool, Tag("namespace")]
    | Annotated[dict[str, Any], Tag("hosted")],
    Discriminator(
        _kind_of_tool,
        custom_error_type="tool_type",
        custom_error_message="type must be function, custom, namespace or one of OpenAI's own, as "
        "web_search",
    ),
]


@dataclass(frozen=True)
class NamedCall:
    """What a call of a function is called in the API."""

    name: str
    namespace: str | None = None
    is_custom: bool = False

    def item(self) -> dict[str, Any]:
        """The beginning of its output item."""
        kind = "custom_tool_call" if self.is_custom else "function_call"
        namespace = {"namespace": self.namespace} if self.namespace else {}
        return {"type": kind, "name": self.name, **namespace}


def full_name(name: str, namespace: str | None) -> str:
    """What the model knows a tool by."""
    return f"{namespace}__{name}" if namespace else name


class Toolbox:
    """A request's tools: what the model is told of, and how its calls are told of."""

    def __init__(self, tools: Iterable[Any]) -> None:
        self.functions: list[Tool] = []
        self.left_out: list[str] = []  # types of tools that the model is not told of
        self._calls: dict[str, NamedCall] = {}
        for tool in tools:
            if isinstance(tool, dict):
                self.left_out.append(str(tool["type"]))
            elif isinstance(tool, NamespaceTool):
                for inner in tool.tools:
                    self._add(inner, tool.name)
            else:
                self._add(tool, None)

    def call(self, name: str) -> NamedCall:
        """Of the function that the model knows by this name."""
        return self._calls.get(name, NamedCall(name))

    def _add(self, tool: FunctionTool | CustomTool, namespace: str | None) -> None:
        name = full_name(tool.name, namespace)
        function = tool.function().model_copy(update={"name": name})
        self.functions.append(Tool(function=function))
        self._calls[name] = NamedCall(tool.name, namespace, isinstance(tool, CustomTool))


def text_of(arguments: str) -> str:
    """The text in a custom tool's arguments; as they are, if there is none."""
    try:
        return str(json.loads(arguments, strict=False)[TEXT_ARGUMENT])
    except (ValueError, LookupError, TypeError, RecursionError):
        return arguments
