"""The ways in which models write tool calls, and which one a chat template teaches."""

from typing import Literal

from deployments.parsing.formats.hermes import Hermes
from deployments.parsing.formats.llama3 import Llama3
from deployments.parsing.formats.mistral import Mistral
from deployments.parsing.tool_format import ToolFormat

ToolParserName = Literal["auto", "none", "hermes", "llama3_json", "mistral"]
ReasoningParserName = Literal["auto", "none", "think"]

# In the order in which templates are searched for their traces.
FORMATS: dict[str, ToolFormat] = {format.name: format for format in (Hermes(), Mistral(), Llama3())}


def tool_format(name: ToolParserName, chat_template: str | None) -> ToolFormat | None:
    """The format by name; with "auto", the one that the template shows its model, if it does."""
    if name != "auto":
        return FORMATS.get(name)
    for candidate in FORMATS.values():
        if chat_template and "tools" in chat_template and candidate.trace in chat_template:
            return candidate
    return None


def reasoning_format(name: ReasoningParserName, chat_template: str | None) -> bool:
    """Whether outputs may begin with a think block."""
    if name == "auto":
        return chat_template is not None and "</think>" in chat_template
    return name == "think"
