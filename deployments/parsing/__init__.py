"""What a model's text holds beside its answer: reasoning and tool calls, found as it comes."""

from deployments.parsing.formats import FORMATS, reasoning_format, tool_format
from deployments.parsing.output import CLOSE, OPEN, OutputParser
from deployments.parsing.pieces import Arguments, CallStart, Content, Piece, Reasoning
from deployments.parsing.tool_format import ToolFormat

__all__ = [
    "CLOSE",
    "FORMATS",
    "OPEN",
    "Arguments",
    "CallStart",
    "Content",
    "OutputParser",
    "Piece",
    "Reasoning",
    "ToolFormat",
    "reasoning_format",
    "tool_format",
]
