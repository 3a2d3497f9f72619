"""{"name": …, "parameters": {…}}, several set apart by semicolons, after <|python_tag|> or not."""

from typing import Any

from deployments.parsing.tool_format import Parts, ToolFormat, arguments_form

_BEGIN = '{"name": "'


class Llama3(ToolFormat):
    name = "llama3_json"
    trace = '"parameters":'
    openers = ("<|python_tag|>",)
    is_bare = True
    prefix = ""

    def trigger(self, function: str) -> str:
        return _BEGIN

    def written(self, function: dict[str, Any]) -> Parts:
        begin = f'{_BEGIN}{function["name"]}", "parameters": '
        return [begin, arguments_form(function), "}"]
