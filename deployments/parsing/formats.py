"""The ways in which models write tool calls, and which one a chat template teaches."""

import secrets
import string
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from deployments.parsing.call_reader import ArgumentsReader, CallReader
from deployments.parsing.pieces import CallStart, Content, Piece, may_become, split_at

ToolParserName = Literal["auto", "none", "hermes", "llama3_json", "mistral"]
ReasoningParserName = Literal["auto", "none", "think"]


class ToolParser(Protocol):
    """Cuts one output's content into content and calls."""

    num_ended: int  # calls that are complete

    def push(self, text: str, last: bool) -> list[Piece]:
        """The pieces that this text makes certain; all that is left if it is the `last`."""
        ...


class _JsonCalls:
    """What the parsers share: text that waits, and the call that is being read."""

    def __init__(self) -> None:
        self._held = ""
        self._reader: CallReader | ArgumentsReader | None = None
        self._num_calls = 0
        self.num_ended = 0

    def push(self, text: str, last: bool) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while True:
            more = self._read_call(last) if self._reader is not None else self._read_text(last)
            if more is None:
                return pieces
            pieces += more

    def _read_text(self, last: bool) -> list[Piece] | None:
        """Content up to the next call; None when nothing can be said without more text."""
        raise NotImplementedError

    def _open_call(self) -> None:
        self._reader = CallReader(self._num_calls, self._new_id())

    def _new_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def _read_call(self, last: bool) -> list[Piece] | None:
        assert self._reader is not None
        if not self._held and not last:
            return None
        text, self._held = self._held, ""
        pieces = self._reader.push(text)
        self._num_calls += sum(isinstance(piece, CallStart) for piece in pieces)
        reader = self._reader
        if reader.rest is None:
            if not last:
                return pieces or None
            self._reader = None  # cut off
            if isinstance(reader, CallReader) and not reader.started:
                pieces.append(Content(self._mark + reader.raw))
            return pieces
        self._reader, self._held = None, reader.rest
        if isinstance(reader, CallReader) and reader.failed:
            self._held = ""
            self._after_failure()
            return [*pieces, Content(self._mark + reader.raw)]
        self.num_ended += 1
        self._after_call()
        return pieces

    _mark = ""  # what has been taken away before a call, to give back if it is none

    def _after_call(self) -> None:
        pass

    def _after_failure(self) -> None:
        pass

    def _text_before_mark(self, last: bool) -> tuple[bool, list[Piece]]:
        """(whether the mark has come, the content before it); white space before it goes too."""
        text, rest = split_at(self._held, self._mark)
        if rest is not None:
            self._held = rest
            return True, self._content(text, before_call=True)
        if last:
            text, self._held = self._held, ""
            return False, self._content(text, before_call=bool(self._num_calls))
        text = text.rstrip()
        self._held = self._held[len(text) :]
        return False, self._content(text, before_call=False)

    def _content(self, text: str, before_call: bool) -> list[Piece]:
        """Content, without the white space that sets calls apart."""
        if before_call:
            text = text.rstrip()
        if self._num_calls:
            text = text.lstrip() if text.isspace() else text
        return [Content(text)] if text else []


class HermesParser(_JsonCalls):
    """<tool_call>{"name": …, "arguments": {…}}</tool_call>: Hermes, Qwen 2.5, Qwen3."""

    _mark = "<tool_call>"
    _end = "</tool_call>"

    def __init__(self) -> None:
        super().__init__()
        self._closing = False  # a call has been read, its closing tag has not

    def _after_call(self) -> None:
        self._closing = True

    def _read_text(self, last: bool) -> list[Piece] | None:
        if self._closing:
            stripped = self._held.lstrip()
            if stripped.startswith(self._end):
                self._held = stripped[len(self._end) :]
            elif may_become(stripped, self._end) and not last:
                return None
            self._closing = False
        if not self._held:
            return None
        found, pieces = self._text_before_mark(last)
        if found:
            self._open_call()
        return pieces if found or pieces else None


class Llama3Parser(_JsonCalls):
    """{"name": …, "parameters": {…}} as the whole answer, several set apart by semicolons."""

    _tag = "<|python_tag|>"
    _keys = ("name", "type", "function", "parameters", "arguments", "id")

    def __init__(self) -> None:
        super().__init__()
        self._is_text = False

    def _after_failure(self) -> None:
        self._is_text = True

    def _read_text(self, last: bool) -> list[Piece] | None:
        if not self._held:
            return None
        if not self._is_text:
            stripped = self._held.lstrip("; \n\t")
            if stripped.startswith(self._tag):
                self._held = stripped = stripped[len(self._tag) :].lstrip()
                if not stripped:
                    return [] if last else None
            if not stripped or may_become(stripped, self._tag):
                if last and stripped:
                    self._is_text = True
                    return []
                return None
            key = _first_key(stripped)
            if key is None and not last:
                return None
            if key in self._keys:
                self._held = stripped
                self._open_call()
                return []
            self._is_text = True
        text, self._held = self._held, ""
        return self._content(text, before_call=False)


def _first_key(text: str) -> str | None:
    """The first key of the JSON object that begins here; "" if none does, None if not there yet."""
    if not text.startswith("{"):
        return ""
    inside = text[1:].lstrip()
    if not inside:
        return None
    if inside[0] != '"':
        return ""
    end = inside.find('"', 1)
    return inside[1:end] if end > 0 else (None if len(inside) < 16 else "")


class MistralParser(_JsonCalls):
    """[TOOL_CALLS] and a JSON array of calls, or, in newer models, name[ARGS]{…} for each call."""

    _mark = "[TOOL_CALLS]"

    def __init__(self) -> None:
        super().__init__()
        self._state: Literal["text", "opened", "array", "name"] = "text"

    def _new_id(self) -> str:
        letters = string.ascii_letters + string.digits  # its chat templates insist on nine of these
        return "".join(secrets.choice(letters) for _ in range(9))

    def _after_call(self) -> None:
        if self._state == "name":
            self._state = "text"

    def _after_failure(self) -> None:
        self._state = "text"

    def _read_text(self, last: bool) -> list[Piece] | None:
        if not self._held:
            return None
        if self._state == "text":
            found, pieces = self._text_before_mark(last)
            self._state = "opened" if found else "text"
            return pieces if found or pieces else None
        stripped = self._held.lstrip()
        if self._state == "opened" and stripped:
            self._state = "array" if stripped[0] == "[" else "name"
            self._held = stripped[1:] if stripped[0] == "[" else stripped
            return []
        if self._state == "array":
            stripped = stripped.lstrip(", \n")
            if stripped.startswith("{"):
                self._held = stripped
                self._open_call()
                return []
            if stripped.startswith("]"):
                self._state, self._held = "text", stripped[1:]
                return []
        if self._state == "name" and (brace := stripped.find("{")) >= 0:
            name = stripped[:brace].replace("[ARGS]", "").partition("[CALL_ID]")[0].strip()
            start: Piece = CallStart(self._num_calls, self._new_id(), name)
            self._reader = ArgumentsReader(self._num_calls)
            self._num_calls += 1
            self._held = stripped[brace:]
            return [start]
        if last:
            self._state, self._held = "text", ""
            return [Content(self._mark + stripped)] if stripped else None
        return None


@dataclass(frozen=True)
class ToolFormat:
    """One way to write tool calls."""

    name: str
    parser: type[HermesParser] | type[Llama3Parser] | type[MistralParser]
    arguments_key: str
    prefix: str  # what precedes a call: the prompt ends with it when a call is forced
    is_array: bool = False  # whether a forced call stands in an array
    has_special_tokens: bool = False  # whether the marks are special tokens, left out of text

    def forced_schema(self, tools: list[dict[str, Any]]) -> dict[str, Any]:
        """JSON schema of what must follow `prefix`: one call of one of these tools.

        Args:
            tools: functions as in the OpenAI API: {name, description, parameters}.
        """
        calls = []
        for tool in tools:
            parameters = tool.get("parameters") or {"type": "object", "properties": {}}
            calls.append(
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": tool["name"]},
                        # The $id keeps references within the parameters.
                        self.arguments_key: parameters | {"$id": tool["name"]},
                    },
                    "required": ["name", self.arguments_key],
                    "additionalProperties": False,
                }
            )
        call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if self.is_array:
            call = {"type": "array", "items": call, "minItems": 1, "maxItems": 1}
        return call


_FORMATS = {
    "hermes": ToolFormat("hermes", HermesParser, "arguments", "<tool_call>\n"),
    "llama3_json": ToolFormat("llama3_json", Llama3Parser, "parameters", "", False, True),
    "mistral": ToolFormat("mistral", MistralParser, "arguments", "[TOOL_CALLS]", True, True),
}
# What in a chat template gives a format away.
_TRACES = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama3_json": '"parameters":'}


def tool_format(name: ToolParserName, chat_template: str | None) -> ToolFormat | None:
    """The format by name; with "auto", the one that the template shows its model, if it does."""
    if name == "none":
        return None
    if name != "auto":
        return _FORMATS[name]
    for candidate, trace in _TRACES.items():
        if chat_template is not None and "tools" in chat_template and trace in chat_template:
            return _FORMATS[candidate]
    return None


def reasoning_format(name: ReasoningParserName, chat_template: str | None) -> bool:
    """Whether outputs may begin with a think block."""
    if name == "auto":
        return chat_template is not None and "</think>" in chat_template
    return name == "think"
