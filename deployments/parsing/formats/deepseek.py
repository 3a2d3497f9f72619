"""name<｜tool▁sep｜>{…} between marks, the object in a block of code in older models: DeepSeek."""

from typing import Any

from deployments.parsing.json_call import MAX_NAME, WORD, CallReader
from deployments.parsing.source import SPACE, Reading, Source
from deployments.parsing.tool_format import Parts, ToolFormat, arguments_form

_SEPARATOR = "<｜tool▁sep｜>"


class DeepSeek(ToolFormat):
    name = "deepseek"
    trace = "<｜tool▁call▁begin｜>"
    openers = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>")
    closers = ("```", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>")
    inner_marks = (_SEPARATOR,)

    def read_marked(self, source: Source, reader: CallReader) -> Reading[None]:
        name = yield from source.all_of(WORD, MAX_NAME)
        if not (yield from source.skip(_SEPARATOR)):
            return
        if name == "function" and not (yield from source.sees("{")):  # V3 and R1
            name = yield from source.all_of(WORD, MAX_NAME)
        yield from source.all_of(SPACE)
        if (yield from source.skip("```json")):
            yield from source.all_of(SPACE)
        if name:
            yield from reader.read_arguments(name)

    def written(self, function: dict[str, Any]) -> Parts:
        """As V3.1 does."""
        begin = f"{self.prefix}{function['name']}{_SEPARATOR}"
        return [begin, arguments_form(function), "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"]
