"""<tool_call>{"name": …, "arguments": {…}}</tool_call>: Hermes, Qwen 2.5, Qwen3."""

from typing import Any

from deployments.parsing.tool_format import Parts, ToolFormat, arguments_form


class Hermes(ToolFormat):
    name = "hermes"
    trace = "<tool_call>"
    openers = ("<tool_call>",)
    closers = ("</tool_call>",)
    prefix = "<tool_call>\n"

    def written(self, function: dict[str, Any]) -> Parts:
        begin = f'{self.prefix}{{"name": "{function["name"]}", "arguments": '
        return [begin, arguments_form(function), "}\n</tool_call>"]
