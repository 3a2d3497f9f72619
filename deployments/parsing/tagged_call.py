"""A tool call whose arguments stand each between tags, read while it is written."""

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deployments.parsing.functions import Functions
from deployments.parsing.json_call import CallReader
from deployments.parsing.source import CHARACTER, SPACE, Reading, Source
from deployments.parsing.tool_format import arguments_form

_MAX_KEY = 128
_KEY = re.compile(r'[^<>"\n]+')
_NEWLINE = re.compile(r"\n")


@dataclass(frozen=True)
class Tags:
    """How an argument is written: `before`, its name, `between`, its value, `after`.

    Args:
        has_lines: the value stands on lines of its own.
    """

    before: str
    between: tuple[str, ...]  # one after another, with space where there may be some
    after: str
    has_lines: bool = False

    def written(self, function: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The forms of a function's arguments, one after another, as its templates write them."""
        schema = arguments_form(function)["json_schema"]
        properties = schema.get("properties")
        if properties is None:  # whatever they are
            name = {"type": "regex", "pattern": "[A-Za-z_][A-Za-z0-9_]{0,63}"}
            return [{"type": "star", "content": self._argument(name, self._any_text(), "\n")}]
        functions, definitions = Functions([function]), schema.get("$defs", {})
        arguments = []
        for key, value in properties.items():
            if functions.is_text(function["name"], key):
                form = self._text(value)
            else:
                own = value | {"$defs": definitions}
                form = {"type": "json_schema", "json_schema": own, "max_whitespace_cnt": 8}
            argument = self._argument({"type": "const_string", "value": key}, form, "\n")
            is_needed = key in schema.get("required", ())
            arguments.append(argument if is_needed else {"type": "optional", "content": argument})
        return arguments

    def _text(self, schema: dict[str, Any]) -> dict[str, Any]:
        if "enum" in schema:
            choices = [{"type": "const_string", "value": choice} for choice in schema["enum"]]
            return {"type": "or", "elements": choices}
        if "pattern" in schema:
            return {"type": "regex", "pattern": schema["pattern"]}
        least = schema.get("minLength", 0)
        text = self._any_text()
        if "maxLength" in schema:
            text["max_chars"] = max(schema["maxLength"] - least, 0)
        begin = {"type": "regex", "pattern": f"[^{self.after[0]}]{{{least}}}"}
        return {"type": "sequence", "elements": [begin, text]} if least else text

    def _argument(self, key: dict[str, Any], value: dict[str, Any], end: str) -> dict[str, Any]:
        line = "\n" if self.has_lines else ""
        texts = self.before, "\n".join(self.between) + line, line + self.after + end
        before, between, after = ({"type": "const_string", "value": text} for text in texts)
        return {"type": "sequence", "elements": [before, key, between, value, after]}

    def _any_text(self) -> dict[str, Any]:
        return {"type": "any_text", "excludes": [self.after]}


class TaggedArguments:
    """Reads arguments up to what is none, and passes them on as JSON."""

    def __init__(self, source: Source, reader: CallReader, name: str, tags: Tags) -> None:
        self._source = source
        self._reader = reader
        self._name = name
        self._tags = tags
        self._text = re.compile(rf"[^\n{re.escape(tags.after[0])}]+")

    def read(self) -> Reading[bool]:
        """Whether the call is one; it is believed by its name."""
        source = self._source
        if not self._reader.begin(self._name, "{"):
            return False
        separator = ""
        while True:
            yield from source.all_of(SPACE)
            if not (yield from source.skip(self._tags.before)):
                break
            key = yield from source.all_of(_KEY, _MAX_KEY)
            if not (yield from self._goes_on_to_value()):
                break
            self._reader.say(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            if not (yield from self._value(key)):
                return True  # cut off
            separator = ", "
        self._reader.say("}")
        return True

    def _goes_on_to_value(self) -> Reading[bool]:
        for mark in self._tags.between:
            if not (yield from self._source.skip(mark)):
                yield from self._source.all_of(SPACE)
                if not (yield from self._source.skip(mark)):
                    return False
        return True

    def _value(self, key: str) -> Reading[bool]:
        """Reads a value and its end; whether that was there."""
        if self._tags.has_lines:
            yield from self._source.skip("\n")
        if self._reader.functions.is_text(self._name, key):
            self._reader.say('"')
            if not (yield from self._pass_on_text(lambda text: self._reader.say(_escaped(text)))):
                return False
            self._reader.say('"')
            return True
        parts: list[str] = []
        is_whole = yield from self._pass_on_text(parts.append)
        self._reader.say(_as_json("".join(parts)))
        return is_whole

    def _pass_on_text(self, say: Any) -> Reading[bool]:
        source, after = self._source, self._tags.after
        while (yield from source.more()):
            if text := source.take(self._text):
                say(text)
            elif self._tags.has_lines and source.take(_NEWLINE):
                if not (yield from source.sees(after)):
                    say("\n")
            elif (yield from source.skip(after)):
                return True
            else:
                say(source.take(CHARACTER))
        return False


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _as_json(text: str) -> str:
    """A value that need not be a text: JSON, the same in Python's words, or else a text."""
    stripped = text.strip()
    try:
        json.loads(stripped, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _from_python(stripped) or json.dumps(text, ensure_ascii=False)
    return stripped


def _from_python(text: str) -> str | None:
    """True, None, {'a': [1]}: templates write them so, and models after them. None: it is not."""
    if text not in ("True", "False", "None") and text[:1] not in ("{", "["):
        return None
    try:
        return json.dumps(ast.literal_eval(text), ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
