"""What a model's text holds beside its answer: reasoning and tool calls, found as it comes."""

from deployments.parsing.formats import FORMATS, tool_format
from deployments.parsing.functions import ANY, Functions
from deployments.parsing.output import OutputParser
from deployments.parsing.pieces import Arguments, CallStart, Content, Piece, Reasoning
from deployments.parsing.reasoning import (
    FINAL,
    REASONING_FORMATS,
    THINK,
    ReasoningFormat,
    reasoning_format,
)
from deployments.parsing.tool_format import ToolFormat

__all__ = [
    "ANY",
    "FINAL",
    "FORMATS",
    "REASONING_FORMATS",
    "THINK",
    "Arguments",
    "CallStart",
    "Content",
    "Functions",
    "OutputParser",
    "Piece",
    "Reasoning",
    "ReasoningFormat",
    "ToolFormat",
    "reasoning_format",
    "tool_format",
]
