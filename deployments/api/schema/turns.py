"""A conversation that is told in items, as the messages of a chat."""

from typing import Any

from engine.text.messages import Message, TextPart, ToolCall


class Turns:
    """Thoughts, words and calls of the assistant in a row become one message."""

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._turn: dict[str, Any] = {}  # of the assistant, so far

    @property
    def messages(self) -> list[Message]:
        """All so far."""
        self._end_turn()
        return self._messages

    def think(self, text: str) -> None:
        self._end_turn()
        self._turn["reasoning_content"] = text

    def say(self, content: str | list[TextPart]) -> None:
        if "content" in self._turn or "tool_calls" in self._turn:
            self._end_turn()
        self._turn["content"] = content

    def call(self, call: ToolCall) -> None:
        self._turn.setdefault("tool_calls", []).append(call)

    def add(self, role: str, content: str | list[TextPart], **fields: Any) -> None:
        """A message of somebody else."""
        self._end_turn()
        self._messages.append(Message(role=role, content=content, **fields))

    def _end_turn(self) -> None:
        if self._turn:
            self._messages.append(Message(role="assistant", **self._turn))
            self._turn = {}
