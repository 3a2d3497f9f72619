"""One tool call in JSON, read while it is written: {"name": …, "arguments": {…}}."""

import json
import re
from typing import Any

from deployments.parsing.pieces import Arguments, CallStart, Piece

# The usual order of keys, which lets arguments be passed on as they come.
_HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,'
    r'\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)


class JsonEnd:
    """Finds where a JSON object or array ends, across pieces of text."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._in_string = False
        self._escaped = False

    def find(self, text: str) -> int | None:
        """The index behind the closing bracket in this further text; None when it is not there."""
        for i, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return i + 1
        return None


class ArgumentsReader:
    """Passes on a JSON object up to its end."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._end = JsonEnd()
        self.rest: str | None = None  # what follows the object, once it has ended

    def push(self, text: str) -> list[Piece]:
        end = self._end.find(text)
        if end is not None:
            text, self.rest = text[:end], text[end:]
        return [Arguments(self._index, text)] if text else []


class CallReader:
    """Reads one call. What turns out not to be one is in `raw`, and `failed` is set."""

    def __init__(self, index: int, call_id: str) -> None:
        self._index, self._id = index, call_id
        self._object = JsonEnd()
        self._arguments: ArgumentsReader | None = None
        self._tail: JsonEnd | None = None
        self.raw = ""
        self.started = False
        self.failed = False
        self.rest: str | None = None  # what follows the call, once it has ended

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        if self._tail is None and self._arguments is None:
            pieces, text = self._read_head(text)
        if self._arguments is not None:
            pieces += self._arguments.push(text)
            if self._arguments.rest is None:
                return pieces
            text, self._arguments, self._tail = self._arguments.rest, None, JsonEnd(depth=1)
        if self._tail is not None:
            end = self._tail.find(text)
            if end is not None:
                self.rest = text[end:]
        return pieces

    def _read_head(self, text: str) -> tuple[list[Piece], str]:
        """Until the arguments begin, or, with another order of keys, the object is complete."""
        before = len(self.raw)
        self.raw += text
        head = _HEAD.match(self.raw)
        if head is not None:
            self.started = True
            self._arguments = ArgumentsReader(self._index)
            return [CallStart(self._index, self._id, _string(head[1]))], self.raw[head.end() :]
        end = self._object.find(text)
        if end is None:
            return [], ""
        complete, self.rest = self.raw[: before + end], text[end:]
        try:
            name, arguments = _parse(json.loads(complete, strict=False))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            self.failed = True
            return [], ""
        self.started = True
        start: Piece = CallStart(self._index, self._id, name)
        return [start, Arguments(self._index, arguments)], ""


def _parse(call: Any) -> tuple[str, str]:
    """(name, arguments as JSON text); raises when it is no call."""
    call = call.get("function", call) if isinstance(call.get("function"), dict) else call
    name = call["name"]
    arguments = call["arguments"] if "arguments" in call else call["parameters"]
    if not isinstance(name, str):
        raise TypeError("a function's name is a string")
    if isinstance(arguments, str):
        return name, arguments
    return name, json.dumps({} if arguments is None else arguments, ensure_ascii=False)


def _string(literal: str) -> str:
    """What a JSON string literal says; invalid escapes stay as they are."""
    try:
        return str(json.loads(literal, strict=False))
    except ValueError:
        return literal[1:-1]
