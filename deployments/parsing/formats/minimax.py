"""<invoke name="…"> with <parameter name="key">value</parameter>, between marks: MiniMax-M2."""

from typing import Any

from deployments.parsing.json_call import MAX_NAME, WORD, CallReader
from deployments.parsing.source import Reading, Source
from deployments.parsing.tagged_call import TaggedArguments, Tags
from deployments.parsing.tool_format import Parts, ToolFormat

_TAGS = Tags('<parameter name="', ('">',), "</parameter>")


class MiniMax(ToolFormat):
    name = "minimax_m2"
    trace = "<minimax:tool_call>"
    openers = ("<minimax:tool_call>", '<invoke name="')  # the first once, for all calls
    closers = ("</invoke>", "</minimax:tool_call>")
    prefix = '<minimax:tool_call>\n<invoke name="'

    def read_marked(self, source: Source, reader: CallReader) -> Reading[None]:
        name = yield from source.all_of(WORD, MAX_NAME)
        if name and (yield from source.skip('">')):
            yield from TaggedArguments(source, reader, name, _TAGS).read()

    def written(self, function: dict[str, Any]) -> Parts:
        begin = f'{self.prefix}{function["name"]}">\n'
        return [begin, *_TAGS.written(function), "</invoke>\n</minimax:tool_call>"]
