"""The ways in which models write tool calls, and which one a chat template teaches."""

from typing import Literal

from deployments.parsing.formats.deepseek import DeepSeek
from deployments.parsing.formats.gemma import Gemma
from deployments.parsing.formats.glm import Glm
from deployments.parsing.formats.harmony import Harmony
from deployments.parsing.formats.hermes import Hermes
from deployments.parsing.formats.json_array import Command, Granite, Hunyuan, Nemotron, Phi4
from deployments.parsing.formats.kimi import Kimi
from deployments.parsing.formats.llama3 import Llama3
from deployments.parsing.formats.minimax import MiniMax
from deployments.parsing.formats.mistral import Mistral
from deployments.parsing.formats.pythonic import Pythonic
from deployments.parsing.formats.qwen3_coder import Qwen3Coder, SeedOss
from deployments.parsing.tool_format import ToolFormat

ToolParserName = (
    Literal["auto", "none", "command", "deepseek", "gemma", "glm45", "granite", "harmony"]
    | Literal["hermes", "hunyuan", "kimi_k2", "llama3_json", "minimax_m2", "mistral"]
    | Literal["nemotron", "phi4", "pythonic", "qwen3_coder", "seed_oss"]
)

# In the order in which templates are searched for their traces: the more telling ones first.
FORMATS: dict[str, ToolFormat] = {
    format.name: format
    for format in (
        *(Harmony(), DeepSeek(), Kimi(), MiniMax(), Glm(), SeedOss(), Qwen3Coder(), Command()),
        *(
            Hunyuan(),
            Nemotron(),
            Phi4(),
            Granite(),
            Hermes(),
            Mistral(),
            Pythonic(),
            Llama3(),
            Gemma(),
        ),
    )
}


def tool_format(name: ToolParserName, chat_template: str | None) -> ToolFormat | None:
    """The format by name; with "auto", the one that the template shows its model, if it does."""
    if name != "auto":
        return FORMATS.get(name)
    for candidate in FORMATS.values():
        if chat_template and "tools" in chat_template and candidate.trace in chat_template:
            return candidate
    return None
