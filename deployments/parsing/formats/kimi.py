"""functions.name:0<|tool_call_argument_begin|>{…} between marks: Kimi-K2."""

import re
from typing import Any

from deployments.parsing.json_call import MAX_NAME, WORD, CallReader
from deployments.parsing.source import SPACE, Reading, Source
from deployments.parsing.tool_format import Parts, ToolFormat, arguments_form

_ARGUMENTS = "<|tool_call_argument_begin|>"
_NUMBER = re.compile(r"[0-9]+")


class Kimi(ToolFormat):
    name = "kimi_k2"
    trace = "<|tool_calls_section_begin|>"
    openers = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>")
    closers = ("<|tool_call_end|>", "<|tool_calls_section_end|>")
    inner_marks = (_ARGUMENTS,)
    prefix = "<|tool_calls_section_begin|><|tool_call_begin|>functions."

    def new_id(self, name: str, number: int) -> str:
        return f"functions.{name}:{number}"

    def read_marked(self, source: Source, reader: CallReader) -> Reading[None]:
        yield from source.skip("functions.")
        name = yield from source.all_of(WORD, MAX_NAME)
        if (yield from source.skip(":")):
            yield from source.all_of(_NUMBER, MAX_NAME)
        yield from source.all_of(SPACE)
        if name and (yield from source.skip(_ARGUMENTS)):
            yield from source.all_of(SPACE)
            yield from reader.read_arguments(name)

    def written(self, function: dict[str, Any]) -> Parts:
        begin = f"{self.prefix}{function['name']}:0{_ARGUMENTS}"
        return [begin, arguments_form(function), "<|tool_call_end|><|tool_calls_section_end|>"]
