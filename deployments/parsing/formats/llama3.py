"""{"name": …, "parameters": {…}}, several set apart by semicolons, after <|python_tag|> or not."""

from deployments.parsing.tool_format import ToolFormat


class Llama3(ToolFormat):
    name = "llama3_json"
    trace = '"parameters":'
    opener = "<|python_tag|>"
    is_bare = True
    arguments_key = "parameters"
    prefix = ""
