"""[TOOL_CALLS] and a JSON array of calls, or, in newer models, name[ARGS]{…} for each call."""

import secrets
import string
from typing import Any

from deployments.parsing.json_call import MAX_NAME, WORD, CallReader
from deployments.parsing.source import SPACE, Reading, Source
from deployments.parsing.tool_format import Parts, ToolFormat, arguments_form


class Mistral(ToolFormat):
    name = "mistral"
    trace = "[TOOL_CALLS]"
    openers = ("[TOOL_CALLS]",)
    inner_marks = ("[CALL_ID]", "[ARGS]")

    def written(self, function: dict[str, Any]) -> Parts:
        begin = f'{self.prefix}[{{"name": "{function["name"]}", "arguments": '
        return [begin, arguments_form(function), "}]"]

    def new_id(self, name: str, number: int) -> str:
        letters = string.ascii_letters + string.digits  # its chat templates insist on nine of these
        return "".join(secrets.choice(letters) for _ in range(9))

    def read_marked(self, source: Source, reader: CallReader) -> Reading[None]:
        if (yield from source.sees("[", "{")):
            yield from super().read_marked(source, reader)
        elif name := (yield from source.all_of(WORD, MAX_NAME)):
            if (yield from source.skip("[CALL_ID]")):
                yield from source.all_of(WORD, MAX_NAME)
            yield from source.skip("[ARGS]")
            yield from source.all_of(SPACE)
            yield from reader.read_arguments(name)
