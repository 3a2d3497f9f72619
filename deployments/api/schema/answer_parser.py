"""The message of an answer, made of a model's text."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from pydantic_core import from_json

from deployments.parsing import Arguments, CallStart, Content, OutputParser, Piece, Reasoning


class AnswerParser:
    """One choice's text as the fields of an assistant's message, whole or in deltas."""

    def __init__(self, parser: OutputParser | None = None) -> None:
        """
        Args:
            parser: None when the text is all content.
        """
        self._parser = parser
        self._arguments: list[str] = []  # of the last call

    def pieces(self, text: str, last: bool) -> list[Piece]:
        """What this text makes certain; all that is left if it is the `last`."""
        if self._parser is None:
            return [Content(text)] if text else []
        pieces = self._parser.push(text, last)
        for piece in pieces:
            match piece:
                case CallStart():
                    self._arguments = []
                case Arguments(_, part):
                    self._arguments.append(part)
        return pieces

    @staticmethod
    def message(pieces: Iterable[Piece]) -> dict[str, Any]:
        """The whole answer."""
        content, reasoning = "", ""
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            match piece:
                case Content(part):
                    content += part
                case Reasoning(part):
                    reasoning += part
                case CallStart(_, name, call_id):
                    function = {"name": name, "arguments": ""}
                    calls.append({"id": call_id, "type": "function", "function": function})
                case Arguments(index, part):
                    calls[index]["function"]["arguments"] += part
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not calls else None,
            "refusal": None,
        }
        if reasoning:
            message |= AnswerParser.delta(Reasoning(reasoning))
        if calls:
            message["tool_calls"] = calls
        return message

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's name for an end at which tools are called.

        A call in which the output ends is not for anybody to carry out.
        """
        called = self._parser is not None and self._parser.num_calls > 0
        return "tool_calls" if called and reason == "stop" and not self.is_cut else reason

    @property
    def is_cut(self) -> bool:
        """Whether the last call's arguments are the beginning of some. What is no JSON is whole."""
        arguments = "".join(self._arguments)
        with suppress(ValueError):
            from_json(arguments)
            return False
        with suppress(ValueError):
            from_json(arguments, allow_partial=True)
            return True
        return not arguments

    @property
    def is_over(self) -> bool:
        """Whether the text can be cut here: the one call that is allowed is complete."""
        return self._parser is not None and self._parser.is_over

    @staticmethod
    def delta(piece: Piece) -> dict[str, Any]:
        """A piece as the `delta` object of a stream."""
        match piece:
            case Content(text):
                return {"content": text}
            case Reasoning(text):
                return {"reasoning_content": text, "reasoning": text}  # clients know one of them
            case CallStart(index, name, call_id):
                function = {"name": name, "arguments": ""}
                call = {"index": index, "id": call_id, "type": "function", "function": function}
                return {"tool_calls": [call]}
            case Arguments(index, text):
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
