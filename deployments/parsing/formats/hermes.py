"""<tool_call>{"name": …, "arguments": {…}}</tool_call>: Hermes, Qwen 2.5, Qwen3."""

from deployments.parsing.tool_format import ToolFormat


class Hermes(ToolFormat):
    name = "hermes"
    trace = "<tool_call>"
    opener = "<tool_call>"
    closer = "</tool_call>"
    prefix = "<tool_call>\n"
