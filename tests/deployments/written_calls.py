"""How models write a call, in each format. A format must read it, however it is cut."""

import json
from collections.abc import Callable
from typing import Any

from deployments.parsing import FORMATS


def _hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def _llama3(name: str, arguments: str) -> str:
    return f'<|python_tag|>{{"name": "{name}", "parameters": {arguments}}}'


def _mistral(name: str, arguments: str) -> str:
    return f"[TOOL_CALLS]{name}[ARGS]{arguments}"


_WRITERS: dict[str, Callable[[str, str], str]] = {
    "hermes": _hermes,
    "llama3_json": _llama3,
    "mistral": _mistral,
}
assert _WRITERS.keys() == FORMATS.keys()


def write_call(format_name: str, name: str, arguments: dict[str, Any]) -> str:
    return _WRITERS[format_name](name, json.dumps(arguments))
