"""call:name{key:<|"|>text<|"|>,n:1} between marks: Gemma 4, and FunctionGemma with other marks."""

import json
import re
from typing import Any

from deployments.parsing.json_call import MAX_NAME, WORD, CallReader
from deployments.parsing.source import CHARACTER, SPACE, Reading, Source
from deployments.parsing.tool_format import Parts, ToolFormat, arguments_form

_QUOTES = ('<|"|>', "<escape>")
_KEY = re.compile(r"[^:,{}\[\]<\s]+")
_TEXT = re.compile(r"[^<]+")
_LITERAL = re.compile(r"[^,{}\[\]<]+")
_MAX_DEPTH = 32


class Gemma(ToolFormat):
    name = "gemma"
    trace = "_call>call:"
    openers = ("<|tool_call>", "<start_function_call>")
    closers = ("<tool_call|>", "<end_function_call>")
    inner_marks = _QUOTES
    prefix = "<|tool_call>call:"

    def read_marked(self, source: Source, reader: CallReader) -> Reading[None]:
        if not (yield from source.skip("call:")):
            return
        name = yield from source.all_of(WORD, MAX_NAME)
        if name and (yield from source.skip("{")) and reader.begin(name, "{"):
            yield from _Arguments(source, reader).object(0)

    def written(self, function: dict[str, Any]) -> Parts:
        """With its arguments in JSON, which is read as well."""
        return [f"{self.prefix}{function['name']}", arguments_form(function), self.closers[0]]


class _Arguments:
    """Passes values on as JSON. False: cut off, or not as it should be."""

    def __init__(self, source: Source, reader: CallReader) -> None:
        self._source = source
        self._reader = reader

    def object(self, depth: int) -> Reading[bool]:
        source, separator = self._source, ""
        while True:
            yield from source.all_of(SPACE)
            if (yield from source.skip("}")):
                self._reader.say("}")
                return True
            if not (yield from source.more()) or not (yield from self._key(separator)):
                return False
            if not (yield from self._value(depth)):
                return False
            yield from source.all_of(SPACE)
            yield from source.skip(",")
            separator = ", "

    def _key(self, separator: str) -> Reading[bool]:
        source = self._source
        if (yield from source.sees('"', *_QUOTES)):
            self._reader.say(separator)
            if not (yield from self._text()):
                return False
        elif key := (yield from source.all_of(_KEY, MAX_NAME)):
            self._reader.say(separator + json.dumps(key, ensure_ascii=False))
        else:
            return False
        yield from source.all_of(SPACE)
        if not (yield from source.skip(":")):
            return False
        self._reader.say(": ")
        yield from source.all_of(SPACE)
        return True

    def _value(self, depth: int) -> Reading[bool]:
        source = self._source
        if (yield from source.sees('"', *_QUOTES)):
            return (yield from self._text())
        if depth < _MAX_DEPTH and (yield from source.skip("{")):
            self._reader.say("{")
            return (yield from self.object(depth + 1))
        if depth < _MAX_DEPTH and (yield from source.skip("[")):
            self._reader.say("[")
            return (yield from self._array(depth + 1))
        literal = yield from source.all_of(_LITERAL)
        self._reader.say(_as_json(literal))
        return bool(literal)

    def _array(self, depth: int) -> Reading[bool]:
        source, separator = self._source, ""
        while True:
            yield from source.all_of(SPACE)
            if (yield from source.skip("]")):
                self._reader.say("]")
                return True
            if not (yield from source.more()):
                return False
            self._reader.say(separator)
            if not (yield from self._value(depth)):
                return False
            yield from source.all_of(SPACE)
            yield from source.skip(",")
            separator = ", "

    def _text(self) -> Reading[bool]:
        if (yield from self._source.skip('"')):
            return (yield from self._json_text())
        quote = _QUOTES[0] if (yield from self._source.skip(_QUOTES[0])) else _QUOTES[1]
        yield from self._source.skip(_QUOTES[1])
        self._reader.say('"')
        while (yield from self._source.more()):
            if text := self._source.take(_TEXT):
                self._reader.say(_escaped(text))
            elif (yield from self._source.skip(quote)):
                self._reader.say('"')
                return True
            else:
                self._reader.say(_escaped(self._source.take(CHARACTER)))
        return False

    def _json_text(self) -> Reading[bool]:
        """The rest of a text as JSON has it."""
        self._reader.say('"')
        while (yield from self._source.more()):
            character = self._source.take(CHARACTER)
            self._reader.say(character)
            if character == '"':
                return True
            if character == "\\" and (yield from self._source.more()):
                self._reader.say(self._source.take(CHARACTER))
        return False


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _as_json(literal: str) -> str:
    try:
        return json.dumps(json.loads(literal), ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return json.dumps(literal.strip(), ensure_ascii=False)
