"""An answer of the Messages API as it grows: its blocks, and the events that tell of them."""

import secrets
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from deployments.parsing import Arguments, CallStart, Content, Piece, Reasoning

Event = dict[str, Any]

# Clients keep a thinking block only with a signature; nobody asks here whose it is.
_SIGNATURE = "unsigned"
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageOutput:
    """Takes a model's answer piece by piece; every piece gives the events of a stream.

    Args:
        shows_thinking: whether thinking blocks have what was thought.
    """

    def __init__(self, model: str, shows_thinking: bool = True) -> None:
        self._model = model
        self._id = f"msg_{secrets.token_hex(12)}"
        self._shows_thinking = shows_thinking
        self._blocks: list[dict[str, Any]] = []
        self._is_open = False  # whether the last block is still growing
        self._json = ""  # of the open block's input
        self._end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._usage: dict[str, Any] = {}
        self.reasoning = ""  # all thoughts

    def message(self) -> dict[str, Any]:
        """The message so far."""
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": list(self._blocks),
            **self._end,
            "usage": self._usage,
        }

    def begin(self, usage: dict[str, Any]) -> Event:
        self._usage = usage
        return {"type": "message_start", "message": self.message()}

    def add(self, piece: Piece) -> Iterator[Event]:
        """The next piece of the answer."""
        match piece:
            case Content(text):
                if not self._is_in("text"):
                    yield from self._open({"type": "text", "text": ""})
                self._blocks[-1]["text"] += text
                yield self._delta("text_delta", text=text)
            case Reasoning(text):
                if not self._is_in("thinking"):
                    yield from self._open({"type": "thinking", "thinking": "", "signature": ""})
                self.reasoning += text
                if self._shows_thinking:
                    self._blocks[-1]["thinking"] += text
                    yield self._delta("thinking_delta", thinking=text)
            case CallStart(_, name, call_id):
                yield from self._open(
                    {"type": "tool_use", "id": call_id, "name": name, "input": {}}
                )
                self._json = ""
            case Arguments(_, text):
                self._json += text
                yield self._delta("input_json_delta", partial_json=text)

    def end(
        self, finish_reason: str | None, stop_reason: int | str | None, usage: dict[str, Any]
    ) -> Iterator[Event]:
        """The answer is complete, or has been cut.

        Args:
            stop_reason: what the engine stopped at.
        """
        yield from self._close()
        reason = _STOP_REASONS.get(finish_reason or "", finish_reason)
        if finish_reason == "stop" and isinstance(stop_reason, str):
            self._end = {"stop_reason": "stop_sequence", "stop_sequence": stop_reason}
        else:
            self._end = {"stop_reason": reason, "stop_sequence": None}
        self._usage = usage
        yield {"type": "message_delta", "delta": self._end, "usage": usage}
        yield {"type": "message_stop"}

    def _is_in(self, kind: str) -> bool:
        return self._is_open and self._blocks[-1]["type"] == kind

    def _open(self, block: dict[str, Any]) -> Iterator[Event]:
        yield from self._close()
        self._blocks.append(block)
        self._is_open = True
        yield self._of_block("content_block_start", content_block=dict(block))

    def _close(self) -> Iterator[Event]:
        if not self._is_open:
            return
        self._is_open = False
        block = self._blocks[-1]
        if block["type"] == "thinking":
            block["signature"] = _SIGNATURE
            yield self._delta("signature_delta", signature=_SIGNATURE)
        elif block["type"] == "tool_use":
            block["input"] = _as_input(self._json)
        yield self._of_block("content_block_stop")

    def _delta(self, kind: str, **fields: str) -> Event:
        return self._of_block("content_block_delta", delta={"type": kind, **fields})

    def _of_block(self, event_type: str, **fields: Any) -> Event:
        return {"type": event_type, "index": len(self._blocks) - 1, **fields}


def _as_input(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object; of those that were cut, or are no JSON, what there is."""
    try:
        found = from_json(arguments or "{}", allow_partial=True)
    except ValueError:
        found = arguments
    return found if isinstance(found, dict) else {"arguments": found}
