"""<tool_call><function=name><parameter=key>value</parameter></function>: Qwen3-Coder, Qwen3.5.

Seed-OSS has other marks around it.
"""

from typing import Any

from deployments.parsing.json_call import MAX_NAME, WORD, CallReader
from deployments.parsing.source import Reading, Source
from deployments.parsing.tagged_call import TaggedArguments, Tags
from deployments.parsing.tool_format import Parts, ToolFormat

_TAGS = Tags("<parameter=", (">",), "</parameter>", has_lines=True)


class Qwen3Coder(ToolFormat):
    name = "qwen3_coder"
    trace = "<parameter="
    openers = ("<tool_call>",)
    closers = ("</function>", "</tool_call>")
    prefix = "<tool_call>\n<function="

    def read_marked(self, source: Source, reader: CallReader) -> Reading[None]:
        if (yield from source.skip("<function=")):
            name = yield from source.all_of(WORD, MAX_NAME)
            if (yield from source.skip(">")):
                yield from TaggedArguments(source, reader, name, _TAGS).read()

    def written(self, function: dict[str, Any]) -> Parts:
        begin = f"{self.prefix}{function['name']}>\n"
        return [begin, *_TAGS.written(function), "\n".join(self.closers)]


class SeedOss(Qwen3Coder):
    name = "seed_oss"
    trace = "<seed:tool_call>"
    openers = ("<seed:tool_call>",)
    closers = ("</function>", "</seed:tool_call>")
    prefix = "<seed:tool_call>\n<function="
