"""<tool_call>name, then <arg_key>key</arg_key><arg_value>value</arg_value>: GLM-4.5 and later."""

from typing import Any

from deployments.parsing.json_call import MAX_NAME, WORD, CallReader
from deployments.parsing.source import SPACE, Reading, Source
from deployments.parsing.tagged_call import TaggedArguments, Tags
from deployments.parsing.tool_format import Parts, ToolFormat

_TAGS = Tags("<arg_key>", ("</arg_key>", "<arg_value>"), "</arg_value>")


class Glm(ToolFormat):
    name = "glm45"
    trace = "<arg_key>"
    openers = ("<tool_call>",)
    closers = ("</tool_call>",)
    inner_marks = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")

    def read_marked(self, source: Source, reader: CallReader) -> Reading[None]:
        name = yield from source.all_of(WORD, MAX_NAME)
        yield from source.all_of(SPACE)
        if name and (yield from source.sees("<arg_key>", "</tool_call>")):
            yield from TaggedArguments(source, reader, name, _TAGS).read()

    def written(self, function: dict[str, Any]) -> Parts:
        begin = f"{self.prefix}{function['name']}\n"
        return [begin, *_TAGS.written(function), "</tool_call>"]
