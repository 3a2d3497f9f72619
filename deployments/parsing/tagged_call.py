"""A tool call whose arguments stand each between tags, read while it is written."""

import json
import re
from dataclasses import dataclass
from typing import Any

from deployments.parsing.json_call import CallReader
from deployments.parsing.source import CHARACTER, SPACE, Reading, Source

_MAX_KEY = 128
_KEY = re.compile(r'[^<>"\n]+')
_NEWLINE = re.compile(r"\n")
_PYTHONS = {"True": True, "False": False, "None": None}


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
    """A value of no known type: JSON, one of Python's constants, or else a text."""
    stripped = text.strip()
    if stripped in _PYTHONS:
        return json.dumps(_PYTHONS[stripped])
    try:
        json.loads(stripped, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return stripped


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
