"""Tools in the chat API: what may be declared, and what a request's choice asks of the model."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from deployments.api.errors import ApiError, validation_error
from deployments.api.schema.call_grammar import CallGrammar
from deployments.api.scope import scope
from deployments.front.front import Front
from deployments.parsing import FORMATS, ToolFormat
from engine.sampling_params import SamplingParams
from engine.strict import explain
from engine.structured_outputs import StructuredOutputs
from engine.text.messages import FunctionName, Tool
from engine.text.request_model import RequestModel


class FunctionReference(RequestModel):
    name: FunctionName


class NamedTool(RequestModel):
    type: Literal["function"] = "function"
    function: FunctionReference


class _Allowed(RequestModel):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1)


class AllowedTools(RequestModel):
    type: Literal["allowed_tools"]
    allowed_tools: _Allowed

    @classmethod
    def of(cls, mode: Literal["auto", "required"], names: Sequence[str]) -> "AllowedTools":
        allowed = _Allowed(mode=mode, tools=[named_tool(name) for name in names])
        return cls(type="allowed_tools", allowed_tools=allowed)


ToolChoice = Literal["none", "auto", "required"] | AllowedTools | NamedTool


def named_tool(name: str) -> NamedTool:
    return NamedTool.model_validate({"function": {"name": name}})


def names_of(choice: ToolChoice | None) -> list[str]:
    """The tools that a choice names."""
    if isinstance(choice, NamedTool):
        return [choice.function.name]
    if isinstance(choice, AllowedTools):
        return [tool.function.name for tool in choice.allowed_tools.tools]
    return []


def left_out_header(kinds: Sequence[str]) -> dict[str, str]:
    """What an answer says of tools that a provider runs, and this server does not: their types."""
    return {"x-tools-left-out": ", ".join(dict.fromkeys(kinds))} if kinds else {}


def find_format(front: Front) -> ToolFormat:
    """How this server's model writes calls; raises ApiError when it does not."""
    if front.tool_format is None:
        raise ApiError(
            400,
            f"tools: the chat template of {front.model_name!r} has no tool calls that this server "
            f"knows; deploy it with tool_parser={' or '.join(FORMATS)} if it does",
            "tools",
            "unsupported_value",
        )
    return front.tool_format


def forced_tools(tools: Sequence[Tool], choice: ToolChoice | None) -> list[Tool]:
    """Those of which one must be called; none when the model may answer without a call."""
    if isinstance(choice, AllowedTools):
        choice = choice.allowed_tools.mode
    if choice in (None, "auto", "none"):
        return []
    names = names_of(choice)
    return [tool for tool in tools if not names or tool.function.name in names]


def call_grammar(
    front: Front, tool_format: ToolFormat, tools: Sequence[Tool], is_forced: bool = False
) -> CallGrammar:
    """What makes grammars of calls of these tools; raises ApiError for a schema that has none.

    The arguments of those that are neither strict nor forced may be any.
    """
    functions = []
    for i, tool in enumerate(tools):
        function = tool.function.model_dump()
        if is_forced or tool.function.strict:
            _check_parameters(tool, f"tools.{i}.function.parameters")
        else:
            function["parameters"] = {"type": "object"}
        functions.append(function)
    return CallGrammar(tool_format, functions, front.special_tokens(tool_format.marks))


def constrain(params: SamplingParams, form: dict[str, Any]) -> SamplingParams:
    """The parameters with a grammar of calls; raises ApiError for what contradicts it."""
    scope().names["structured_outputs"] = "tools"
    given = params.model_dump(exclude_unset=True, exclude={"structured_outputs"})
    try:
        return SamplingParams(**given, structured_outputs=form)
    except ValidationError as error:
        raise validation_error(explain(error.errors())) from error


def _check_parameters(tool: Tool, path: str) -> None:
    """Raises ApiError for a schema that no grammar can be made of."""
    if tool.function.parameters is None:
        return
    try:
        StructuredOutputs(json=tool.function.parameters)
    except ValidationError as error:
        field, fault = explain(error.errors())[0]
        param = path + field.removeprefix("json")
        raise ApiError(400, f"{param}: {fault}", param) from error
