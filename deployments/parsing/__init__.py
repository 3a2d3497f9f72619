"""What a model's text holds beside its answer: reasoning and tool calls, found as it comes."""

from deployments.parsing.formats import ToolFormat, reasoning_format, tool_format
from deployments.parsing.output import OutputParser
from deployments.parsing.pieces import Arguments, CallStart, Content, Piece, Reasoning
from deployments.parsing.reasoning import ReasoningSplitter

__all__ = [
    "Arguments",
    "CallStart",
    "Content",
    "OutputParser",
    "Piece",
    "Reasoning",
    "ReasoningSplitter",
    "ToolFormat",
    "reasoning_format",
    "tool_format",
]
