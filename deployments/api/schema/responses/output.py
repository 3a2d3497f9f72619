"""An answer of the Responses API as it grows: its items, and the events that tell of them."""

import secrets
from collections.abc import Iterator
from typing import Any

from deployments.api.errors import ApiError
from deployments.api.schema.responses.items import sealed
from deployments.api.schema.responses.tools import Toolbox, text_of
from deployments.parsing import Arguments, CallStart, Content, Piece, Reasoning

Event = dict[str, Any]

_NO_LOGPROBS: dict[str, list[Any]] = {"logprobs": []}


class ResponseOutput:
    """Takes a model's answer piece by piece; every piece gives the events of a stream.

    Args:
        head: the response's fields beside those that say how far it is.
        toolbox: the tools that may be called.
        seals_thoughts: whether reasoning items have `encrypted_content`.
    """

    def __init__(
        self, head: dict[str, Any], toolbox: Toolbox, seals_thoughts: bool = False
    ) -> None:
        self._head = head
        self._toolbox = toolbox
        self._seals_thoughts = seals_thoughts
        self._arguments = ""  # of the call that is open
        self._items: list[dict[str, Any]] = []
        self._is_open = False  # whether the last item is still growing
        self._sequence = 0
        self._end: dict[str, Any] = {
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "usage": None,
        }

    def response(self) -> dict[str, Any]:
        """The response so far."""
        return self._head | {"output": self._items} | self._end

    @property
    def is_complete(self) -> bool:
        return self._end["status"] in ("completed", "incomplete")

    @property
    def reasoning(self) -> str:
        """All thoughts."""
        return "".join(
            item["content"][0]["text"] for item in self._items if item["type"] == "reasoning"
        )

    def begin(self) -> Iterator[Event]:
        yield self._event("response.created", response=self.response())
        yield self._event("response.in_progress", response=self.response())

    def add(self, piece: Piece) -> Iterator[Event]:
        """The next piece of the answer."""
        match piece:
            case Content(text):
                yield from self._add_text("message", "output_text", text)
            case Reasoning(text):
                yield from self._add_text("reasoning", "reasoning_text", text)
            case CallStart(_, name, call_id):
                yield from self.end_item()
                self._arguments = ""
                call = self._toolbox.call(name)
                prefix, field = ("ctc", "input") if call.is_custom else ("fc", "arguments")
                yield self._open_item(prefix, {"call_id": call_id, **call.item(), field: ""})
            case Arguments(_, text):
                self._arguments += text
                if self._items[-1]["type"] == "function_call":
                    self._items[-1]["arguments"] += text
                    yield self._of_item("response.function_call_arguments.delta", delta=text)

    def end(self, finish_reason: str | None, usage: dict[str, Any]) -> Iterator[Event]:
        """The answer is complete, or has been cut at a length."""
        is_cut = finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        yield from self.end_item(status)
        self._end = {
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": usage,
        }
        yield self._event(f"response.{status}", response=self.response())

    def fail(self, error: ApiError) -> Event:
        """There will be no more of it."""
        code = "invalid_prompt" if error.status == 400 else "server_error"
        self._end["status"] = "failed"
        self._end["error"] = {"code": code, "message": error.message}
        return self._event("response.failed", response=self.response())

    def end_item(self, status: str = "completed") -> Iterator[Event]:
        if not self._is_open:
            return
        item = self._items[-1]
        self._is_open = False
        item["status"] = status
        if item["type"] == "function_call":
            yield self._of_item(
                "response.function_call_arguments.done",
                name=item["name"],
                arguments=item["arguments"],
            )
        elif item["type"] == "custom_tool_call":
            item["input"] = text_of(self._arguments)  # all at once: it was written as JSON
            yield self._of_item("response.custom_tool_call_input.delta", delta=item["input"])
            yield self._of_item("response.custom_tool_call_input.done", input=item["input"])
        else:
            (part,) = item["content"]
            extra = _NO_LOGPROBS if part["type"] == "output_text" else {}
            yield self._of_part(f"response.{part['type']}.done", text=part["text"], **extra)
            yield self._of_part("response.content_part.done", part=dict(part))
            if self._seals_thoughts and item["type"] == "reasoning":
                item["encrypted_content"] = sealed(part["text"])
        yield self._event(
            "response.output_item.done", output_index=len(self._items) - 1, item=dict(item)
        )

    def _add_text(self, item_type: str, part_type: str, text: str) -> Iterator[Event]:
        is_text = part_type == "output_text"
        if not self._is_open or self._items[-1]["type"] != item_type:
            yield from self.end_item()
            opening: dict[str, Any] = {"role": "assistant"} if is_text else {"summary": []}
            prefix = "msg" if is_text else "rs"
            yield self._open_item(prefix, {"type": item_type, **opening, "content": []})
            part: dict[str, Any] = {"type": part_type, "text": ""}
            if is_text:
                part["annotations"] = []
            self._items[-1]["content"] = [part]
            yield self._of_part("response.content_part.added", part=dict(part))
        self._items[-1]["content"][0]["text"] += text
        extra = _NO_LOGPROBS if is_text else {}
        yield self._of_part(f"response.{part_type}.delta", delta=text, **extra)

    def _open_item(self, prefix: str, fields: dict[str, Any]) -> Event:
        item = {"id": f"{prefix}_{secrets.token_hex(16)}", "status": "in_progress", **fields}
        self._items.append(item)
        self._is_open = True
        index = len(self._items) - 1
        return self._event("response.output_item.added", output_index=index, item=dict(item))

    def _of_part(self, event_type: str, **fields: Any) -> Event:
        return self._of_item(event_type, content_index=0, **fields)

    def _of_item(self, event_type: str, **fields: Any) -> Event:
        index = len(self._items) - 1
        item_id = self._items[-1]["id"]
        return self._event(event_type, item_id=item_id, output_index=index, **fields)

    def _event(self, event_type: str, **fields: Any) -> Event:
        self._sequence += 1
        return {"type": event_type, "sequence_number": self._sequence - 1, **fields}
