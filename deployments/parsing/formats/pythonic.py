"""[name(key='value', n=1), …]: a list of Python calls, as Llama 3.2 and 4 write it."""

import ast
import json
import re
from typing import Any

from deployments.parsing.functions import Functions
from deployments.parsing.json_call import MAX_NAME, WORD, CallReader
from deployments.parsing.pieces import Piece
from deployments.parsing.source import BLANKS, SPACE, Reading, Source
from deployments.parsing.tool_format import Parts, ToolFormat, arguments_form, beginning_of

_KEY = re.compile(r"\w+")


class Pythonic(ToolFormat):
    name = "pythonic"
    trace = "func_name1("
    openers = ("<|python_start|>",)
    closers = ("<|python_end|>",)
    prefix = "["

    @property
    def first_characters(self) -> str:
        return "<["

    @property
    def beginning(self) -> str:
        bare = rf"\[[{BLANKS}]*+(?:\Z|[A-Za-z_][\w.-]*+(?:\Z|\())"
        return f"{beginning_of(self.openers[0])}|{bare}"

    def read_call(
        self, source: Source, pieces: list[Piece], functions: Functions, index: int, follows: bool
    ) -> Reading[bool]:
        yield from self._open(source)
        if not (yield from source.skip("[")) and not follows:
            return False
        yield from source.all_of(SPACE)
        name = yield from source.all_of(WORD, MAX_NAME)
        reader = self.reader(source, pieces, functions, index)
        if name and (yield from source.skip("(")):
            yield from _read_arguments(source, reader, name)
        return reader.is_believed

    def trigger(self, function: str) -> str:
        return f"[{function}("

    def written(self, function: dict[str, Any]) -> Parts:
        """With those arguments that it must have."""
        schema = arguments_form(function)["json_schema"]
        parts: Parts = [self.trigger(function["name"])]
        for i, key in enumerate(schema.get("required", ())):
            value = schema["properties"].get(key, {}) | {"$defs": schema.get("$defs", {})}
            parts += [f"{', ' if i else ''}{key}=", {"type": "json_schema", "json_schema": value}]
        return [*parts, ")]"]


def _read_arguments(source: Source, reader: CallReader, name: str) -> Reading[None]:
    """What is between the parentheses; believed once that is nothing, or a key and its sign."""
    separator = "{"
    while True:
        yield from source.all_of(SPACE)
        if (yield from source.skip(")")):
            if separator != "{" or reader.begin(name, "{"):
                reader.say("}")
            return
        key = yield from source.all_of(_KEY, MAX_NAME)
        yield from source.all_of(SPACE)
        if not key or not (yield from source.skip("=")):
            return
        if not (reader.is_believed or reader.begin(name, "")):
            return
        reader.say(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        separator = ", "
        literal = _Literal()
        parts: list[str] = []
        while not literal.is_over and (yield from source.more()):
            parts.append(source.take_up_to(literal.find))
        reader.say(_as_json("".join(parts)))
        if not literal.is_over:
            return
        yield from source.skip(",")


class _Literal:
    """Finds where a Python literal ends: before a comma or parenthesis that is not within it."""

    _SPECIAL = re.compile(r"\\.|[\\'\"()\[\]{},]", re.DOTALL)

    def __init__(self) -> None:
        self._quote = ""
        self._depth = 0
        self._escaped = False  # the next character is
        self.is_over = False

    def find(self, text: str, start: int) -> int:
        """The index of the end, or behind the text."""
        start += self._escaped
        self._escaped = False
        for match in self._SPECIAL.finditer(text, start):
            character = match[0]
            if character[0] == "\\":
                self._escaped = len(character) == 1
            elif self._quote:
                self._quote = "" if character == self._quote else self._quote
            elif character in "'\"":
                self._quote = character
            elif self._depth == 0 and character in ",)":
                self.is_over = True
                return match.start()
            elif character in "([{":
                self._depth += 1
            elif character in ")]}":
                self._depth -= 1
        return len(text)


def _as_json(literal: str) -> str:
    """JSON, a Python literal, or else a text."""
    try:
        return json.dumps(json.loads(literal), ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        pass
    try:
        value = ast.literal_eval(literal.strip())
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return json.dumps(literal, ensure_ascii=False)
