"""One tool call in JSON, read while it is written: {"name": …, "arguments": {…}}."""

import json
import re
from collections.abc import Callable
from typing import Any

from deployments.parsing.functions import Functions
from deployments.parsing.pieces import Arguments, CallStart, Piece
from deployments.parsing.source import BLANKS, SPACE, Reading, Source

MAX_NAME = 128
WORD = re.compile(r"[A-Za-z0-9_.-]+")
_NO_BLANK = re.compile(f"[^{BLANKS}]")
_LITERAL = re.compile(r"[\w.+-]+")
_ARGUMENTS = ("arguments", "parameters")
_NO_JSON = object()
_NAMES = ("name", "tool_name")
KEYS = (*_NAMES, "type", "function", "id", "tool_call_id", *_ARGUMENTS)


class _ValueEnd:
    """Finds where a JSON string, object or array ends, across parts of its text."""

    def __init__(self, depth: int, stops: tuple[str, ...]) -> None:
        """
        Args:
            depth: brackets that are open.
            stops: marks that end it where it has none of them: outside a string, or anywhere once
                a quotation mark is missing or too much, so that nobody knows what is a string.
        """
        self._stops = "".join(stop[0] for stop in stops)
        self._special = re.compile(rf'\\.|["\\{{}}\[\]{re.escape(self._stops)}]', re.DOTALL)
        self._depth = depth
        self._in_string = False
        self._is_behind_string = False
        self._is_broken = False
        self._escaped = False  # the next character is
        self.is_over = False
        self.may_stop = False  # the next character begins a stop, or goes on like any other

    def find(self, text: str, start: int) -> int:
        """The index behind the end, or of what may be a stop, or behind the text."""
        if self._is_behind_string:
            self._look_behind_string(text, start)
        no_stop = start if self.may_stop else -1
        start += self._escaped
        self._escaped = self.may_stop = False
        for match in self._special.finditer(text, start):
            character = match[0]
            if character == '"':
                self._in_string = not self._in_string
                self.is_over = not (self._in_string or self._depth)
                if not self._in_string:
                    self._look_behind_string(text, match.end())
            elif character[0] == "\\":
                self._escaped = len(character) == 1
            elif character in self._stops and match.start() != no_stop and self._has_stops:
                self.may_stop = True
                return match.start()
            elif self._in_string:
                continue
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                self.is_over = self._depth <= 0
            if self.is_over:
                return match.end()
        return len(text)

    @property
    def _has_stops(self) -> bool:
        return self._is_broken or not self._in_string

    def _look_behind_string(self, text: str, start: int) -> None:
        following = _NO_BLANK.search(text, start)
        self._is_behind_string = following is None
        self._is_broken |= following is not None and following[0] not in ",:}]"


class CallReader:
    """Reads one call from a source, behind whatever opens it.

    It is believed, and its pieces come, once its name and the beginning of its arguments are there;
    in another order of keys, once all of it is. After that whatever it lacks is its own fault.
    """

    def __init__(
        self,
        source: Source,
        pieces: list[Piece],
        new_start: Callable[[str], CallStart],
        stops: tuple[str, ...],
        functions: Functions,
    ) -> None:
        """
        Args:
            pieces: where the call's pieces are put.
            new_start: the first of them, given the call's name.
            stops: marks that end the call where they stand outside a string.
            functions: those that may be called.
        """
        self.functions = functions
        self._source = source
        self._pieces = pieces
        self._new_start = new_start
        self._stops = stops
        self._start: CallStart | None = None
        self._name: str | None = None
        self._arguments: str | None = None

    @property
    def is_believed(self) -> bool:
        return self._start is not None

    def read(self, strict: bool = False) -> Reading[None]:
        """Reads the object.

        Args:
            strict: nothing else says that this is a call, so it has no keys but a call's, and its
                arguments are an object.
        """
        source = self._source
        has_other_keys = False
        depth = int((yield from source.skip("{")))
        while depth:
            yield from source.all_of(SPACE)
            if (yield from source.skip("}")):
                depth -= 1
            else:
                key = yield from self._key()
                has_other_keys |= key not in KEYS
                if key is None or (strict and has_other_keys and not self.is_believed):
                    return
                if key == "function" and (yield from source.skip("{")):
                    depth += 1
                    continue
                if not (yield from self._member(key)):
                    return
                yield from source.all_of(SPACE)
            if depth:
                yield from source.skip(",")
        if self._name is not None and not self.is_believed:
            arguments = self._arguments or ("" if strict or has_other_keys else "{}")
            if arguments.startswith("{") or (arguments and not strict):
                self.begin(self._name, arguments)

    def read_arguments(self, name: str) -> Reading[bool]:
        """Reads an object, which is passed on as it comes; whether there was one, to its end."""
        source = self._source
        if not self.functions.has(name) or not (yield from source.skip("{")):
            return False
        space = yield from source.all_of(SPACE)
        if not (yield from source.sees('"', "}")):
            return False
        self.begin(name, "{" + space)
        return (yield from self._value(1, self.say))

    def begin(self, name: str, arguments: str) -> bool:
        """The call is one, if there is such a function."""
        if not self.functions.has(name):
            return False
        self._start = self._new_start(name)
        self._pieces.append(self._start)
        self.say(arguments)
        return True

    def say(self, arguments: str) -> None:
        """The next part of the arguments' JSON."""
        assert self._start is not None
        self._pieces.append(Arguments(self._start.index, arguments))

    def _key(self) -> Reading[str | None]:
        key = yield from self._word()
        if key is None:
            return None
        yield from self._source.all_of(SPACE)
        has_value = yield from self._source.skip(":")
        yield from self._source.all_of(SPACE)
        return key if has_value else None

    def _word(self) -> Reading[str | None]:
        """A string of letters; None if it is another or too long."""
        if not (yield from self._source.skip('"')):
            return None
        word = yield from self._source.all_of(WORD, MAX_NAME)
        return word if word and (yield from self._source.skip('"')) else None

    def _member(self, key: str) -> Reading[bool]:
        """Reads a key's value; false where it is cut off, or none that the key can have."""
        if key in _NAMES and self._name is None:
            self._name = yield from self._word()
            return self._name is not None and self.functions.has(self._name)
        if key not in _ARGUMENTS or self._arguments is not None or self._start is not None:
            return (yield from self._value(0, lambda text: None))
        if self._name is not None and (yield from self._source.sees("{")):
            return (yield from self.read_arguments(self._name))
        parts: list[str] = []
        is_whole = yield from self._value(0, parts.append)
        self._arguments = _as_object("".join(parts)) if is_whole else None
        return self._arguments is not None

    def _value(self, depth: int, say: Callable[[str], None]) -> Reading[bool]:
        """Reads a JSON value, or the rest of one with so many open brackets, to its end."""
        source = self._source
        if not depth:
            if literal := (yield from source.all_of(_LITERAL)):
                say(literal)
                return True
            if not (yield from source.sees('"', "{", "[")):
                return False
        end = _ValueEnd(depth, self._stops)
        while (yield from source.more()):
            say(source.take_up_to(end.find))
            if end.is_over:
                return True
            if end.may_stop and (yield from source.sees(*self._stops)):
                break
        return False


def _as_object(value: str) -> str | None:
    """A JSON value as a call's arguments: null is none, a string may hold them. None if no JSON."""
    loaded = _load(value)
    if loaded in (None, ""):
        return "{}"
    if isinstance(loaded, str) and isinstance(_load(loaded), dict):
        return loaded
    return None if loaded is _NO_JSON else value


def _load(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return _NO_JSON
