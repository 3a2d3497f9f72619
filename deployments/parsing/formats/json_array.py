"""A JSON array of calls between marks: Granite 3, Phi-4, Hunyuan, Nemotron, Command."""

from typing import Any, ClassVar

from deployments.parsing.tool_format import Parts, ToolFormat, arguments_form


class _JsonArray(ToolFormat):
    keys: ClassVar[tuple[str, str]] = ("name", "arguments")

    def written(self, function: dict[str, Any]) -> Parts:
        name, arguments = self.keys
        begin = f'{self.prefix}[{{"{name}": "{function["name"]}", "{arguments}": '
        return [begin, arguments_form(function), "}]" + "".join(self.closers)]


class Phi4(_JsonArray):
    name = "phi4"
    trace = "<|tool|>"
    openers = ("<|tool_call|>",)
    closers = ("<|/tool_call|>",)


class Granite(_JsonArray):
    name = "granite"
    trace = "<|tool_call|>"
    openers = ("<|tool_call|>",)


class Hunyuan(_JsonArray):
    name = "hunyuan"
    trace = "<tool_calls>"
    openers = ("<tool_calls>",)
    closers = ("</tool_calls>",)


class Nemotron(_JsonArray):
    name = "nemotron"
    trace = "<TOOLCALL>"
    openers = ("<TOOLCALL>",)
    closers = ("</TOOLCALL>",)


class Command(_JsonArray):
    name = "command"
    trace = "<|START_ACTION|>"
    openers = ("<|START_ACTION|>",)
    closers = ("<|END_ACTION|>",)
    keys = ("tool_name", "parameters")
