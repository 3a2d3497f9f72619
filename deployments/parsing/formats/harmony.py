"""Channels, as gpt-oss writes them: analysis is thought, commentary calls, final is the answer."""

import re
from collections.abc import Callable
from typing import Any

from deployments.parsing.functions import Functions
from deployments.parsing.pieces import Arguments, CallStart, Content, Piece, Reasoning
from deployments.parsing.source import BLANKS, CHARACTER, SPACE, Reading, Source
from deployments.parsing.tool_format import Parts, ToolFormat, arguments_form

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_CONSTRAIN = "<|constrain|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_MAX_HEADER = 512
_TEXT = re.compile(rf"[^<{BLANKS}]+")
_HEADER = re.compile(r"[^<]+")
_KIND = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")


class Harmony(ToolFormat):
    name = "harmony"
    trace = "<|channel|>commentary"
    openers = (_CHANNEL,)
    closers = _ENDS
    inner_marks = (_START, _MESSAGE, _CONSTRAIN)
    has_channels = True
    prefix = "<|channel|>commentary to=functions."

    def written(self, function: dict[str, Any]) -> Parts:
        begin = f"{self.prefix}{function['name']} {_CONSTRAIN}json{_MESSAGE}"
        return [begin, arguments_form(function)]


class ChannelReader:
    """Reads an output in channels, message by message.

    Args:
        functions: those that may be called; None if none may.
        call: gives a call of this name its start, or None when no more are wanted.
    """

    def __init__(
        self,
        source: Source,
        pieces: list[Piece],
        functions: Functions | None,
        call: Callable[[str], CallStart | None],
    ) -> None:
        self._source = source
        self._pieces = pieces
        self._functions = functions
        self._call = call

    def read(self) -> Reading[None]:
        source = self._source
        # The prompt has begun a header, in which a recipient may come before the channel.
        begins = yield from source.sees(_START, _CHANNEL, " to=", "to=")
        while (yield from source.more()):
            if begins or (yield from source.sees(_START, _CHANNEL)):
                begins = False
                header = yield from self._header()
                if header is None:
                    self._pieces.append(Content(source.taken()))
                elif not (yield from self._message(header)):
                    return
            else:
                yield from self._body(Content)

    def _header(self) -> Reading[str | None]:
        """What precedes a message; None if none follows it."""
        source = self._source
        source.taken()
        before = source.num_taken
        while source.num_taken - before < _MAX_HEADER and (yield from source.more()):
            if (yield from source.skip(_MESSAGE)):
                return source.taken()
            if (yield from source.sees(*_ENDS)):
                break
            if not source.take(_HEADER, _MAX_HEADER):
                source.take(CHARACTER)
        return None

    def _message(self, header: str) -> Reading[bool]:
        """Whether the output goes on behind it."""
        recipient, kind = _RECIPIENT.search(header), _KIND.search(header)
        name = recipient[1] if recipient else ""
        if name and self._functions is not None and self._functions.has(name):
            start = self._call(name)
            if start is None:
                return False
            self._pieces.append(start)
            yield from self._arguments(start.index)
            return True
        is_thought = kind is not None and kind[1] == "analysis"
        yield from self._body(Reasoning if is_thought else Content)
        return True

    def _arguments(self, index: int) -> Reading[None]:
        yield from self._source.all_of(SPACE)
        if not (yield from self._source.more()) or (yield from self._source.sees(*_ENDS)):
            self._pieces.append(Arguments(index, "{}"))
        yield from self._body(lambda text: Arguments(index, text))

    def _body(self, piece: Callable[[str], Piece]) -> Reading[None]:
        """Up to the message's end; white space before that is dropped."""
        source = self._source
        source.taken()
        while (yield from source.more()):
            if source.take(_TEXT):
                self._pieces.append(piece(source.taken()))
            elif source.take(SPACE):
                pass  # said with what follows, if that is of the message
            elif (yield from source.sees(_START, _CHANNEL)) or (yield from source.skip(*_ENDS)):
                break
            else:
                source.take(CHARACTER)
                self._pieces.append(piece(source.taken()))
        source.taken()
