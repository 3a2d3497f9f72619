"""Responses that later ones may go on from: the last ones of this replica, in memory."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from engine.text.messages import Message

_MAX_RESPONSES = 4096
_MAX_CHARACTERS = 64 * 2**20


@dataclass(frozen=True)
class StoredResponse:
    """A response, and the conversation that it ends, without its instructions."""

    body: dict[str, Any]
    messages: list[Message]
    size: int  # characters


class ResponseStore:
    """Responses by tenant and id: those of a tenant are nobody else's."""

    def __init__(self, max_characters: int = _MAX_CHARACTERS) -> None:
        self._max_characters = max_characters
        self._responses: OrderedDict[tuple[str, str], StoredResponse] = OrderedDict()
        self._size = 0

    def put(self, tenant: str, body: dict[str, Any], messages: list[Message]) -> None:
        size = len(to_json(body))  # with tools that no prompt has
        size += sum(len(message.model_dump_json(exclude_unset=True)) for message in messages)
        if size > self._max_characters:
            return
        self._responses[tenant, body["id"]] = StoredResponse(body, messages, size)
        self._size += size
        while len(self._responses) > _MAX_RESPONSES or self._size > self._max_characters:
            self._size -= self._responses.popitem(last=False)[1].size

    def get(self, tenant: str, response_id: str) -> StoredResponse | None:
        found = self._responses.get((tenant, response_id))
        if found is not None:
            self._responses.move_to_end((tenant, response_id))
        return found

    def delete(self, tenant: str, response_id: str) -> bool:
        """Whether it was there."""
        found = self._responses.pop((tenant, response_id), None)
        self._size -= found.size if found else 0
        return found is not None
