"""How models write a call, in each format. A format must read it, however it is cut."""

import json
from collections.abc import Callable
from typing import Any

from deployments.parsing import FORMATS, Functions

Arguments = dict[str, Any]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _raw(value: Any) -> str:
    """As templates write what stands between tags: texts as they are."""
    return value if isinstance(value, str) else _json(value)


def _tagged(before: str, between: str, after: str) -> Callable[[Arguments], str]:
    return lambda arguments: "".join(
        f"{before}{key}{between}{_raw(value)}{after}" for key, value in arguments.items()
    )


_qwen = _tagged("<parameter=", ">\n", "\n</parameter>\n")
_glm = _tagged("\n<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>")
_minimax = _tagged('<parameter name="', '">', "</parameter>\n")


def _array(name: str, arguments: Arguments, *keys: str) -> str:
    call = dict(zip(keys or ("name", "arguments"), (name, arguments), strict=True))
    return f"[{_json(call)}]"


def _pythonic(name: str, arguments: Arguments) -> str:
    return f"[{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})]"


def _gemma_value(value: Any) -> str:
    match value:
        case str():
            return f'<|"|>{value}<|"|>'
        case dict():
            inner = ",".join(f'<|"|>{k}<|"|>:{_gemma_value(v)}' for k, v in value.items())
            return f"{{{inner}}}"
        case list():
            return f"[{','.join(map(_gemma_value, value))}]"
    return _json(value)


def _gemma(name: str, arguments: Arguments) -> str:
    inner = ",".join(f"{key}:{_gemma_value(value)}" for key, value in arguments.items())
    return f"<|tool_call>call:{name}{{{inner}}}<tool_call|>"


_WRITERS: dict[str, Callable[[str, Arguments], str]] = {
    "hermes": lambda name, arguments: (
        f'<tool_call>\n{{"name": "{name}", "arguments": {_json(arguments)}}}\n</tool_call>'
    ),
    "llama3_json": lambda name, arguments: (
        f'<|python_tag|>{{"name": "{name}", "parameters": {_json(arguments)}}}'
    ),
    "mistral": lambda name, arguments: f"[TOOL_CALLS]{name}[ARGS]{_json(arguments)}",
    "qwen3_coder": lambda name, arguments: (
        f"<tool_call>\n<function={name}>\n{_qwen(arguments)}</function>\n</tool_call>"
    ),
    "glm45": lambda name, arguments: f"<tool_call>{name}{_glm(arguments)}\n</tool_call>",
    "minimax_m2": lambda name, arguments: (
        f'<minimax:tool_call>\n<invoke name="{name}">\n{_minimax(arguments)}</invoke>\n'
        "</minimax:tool_call>"
    ),
    "deepseek": lambda name, arguments: (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n"
        f"```json\n{_json(arguments)}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "kimi_k2": lambda name, arguments: (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.{name}:0"
        f"<|tool_call_argument_begin|>{_json(arguments)}<|tool_call_end|>"
        "<|tool_calls_section_end|>"
    ),
    "harmony": lambda name, arguments: (
        f"<|start|>assistant<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>"
        f"{_json(arguments)}<|call|>"
    ),
    "phi4": lambda *call: f"<|tool_call|>{_array(*call)}<|/tool_call|>",
    "granite": lambda *call: f"<|tool_call|>{_array(*call)}",
    "seed_oss": lambda name, arguments: (
        f"<seed:tool_call>\n<function={name}>\n{_qwen(arguments)}</function>\n</seed:tool_call>"
    ),
    "nemotron": lambda *call: f"<TOOLCALL>{_array(*call)}</TOOLCALL>",
    "hunyuan": lambda *call: f"<tool_calls>{_array(*call)}</tool_calls>",
    "command": lambda *call: (
        f"<|START_ACTION|>{_array(*call, 'tool_name', 'parameters')}<|END_ACTION|>"
    ),
    "pythonic": _pythonic,
    "gemma": _gemma,
}
assert _WRITERS.keys() == FORMATS.keys()


def write_call(format_name: str, name: str, arguments: Arguments) -> str:
    return _WRITERS[format_name](name, arguments)


def functions_of(**arguments: Any) -> Functions:
    """A function "weather" whose parameters have the types of these arguments."""
    types = {key: {"type": "string"} for key, value in arguments.items() if isinstance(value, str)}
    properties = {key: types.get(key, {}) for key in arguments} or {"city": {}}
    return Functions([{"name": "weather", "parameters": {"properties": properties}}])
