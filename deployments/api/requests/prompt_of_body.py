"""The prompt of a body, whichever endpoint it is for: a router has nothing but the body."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from deployments.api.bodies import parse
from deployments.api.errors import ApiError
from deployments.api.schema.completion_request import CompletionRequest
from deployments.api.schema.message_request import MessagesRequest
from deployments.api.schema.protocol import ChatCompletionRequest, ServedRequest
from deployments.api.schema.responses.request import ResponseRequest
from engine.text.tokenizer import Tokenizer

# By the field that holds the prompt. Where several kinds of requests have one field, the first that
# takes the body has it: what they have in common they mean alike.
_REQUESTS: list[tuple[str, type[ServedRequest]]] = [
    ("messages", ChatCompletionRequest),
    ("messages", MessagesRequest),
    ("input", ResponseRequest),
    ("prompt", CompletionRequest),
]


@dataclass(frozen=True)
class Prompt:
    """A body's prompt in tokens, and how it was read."""

    tokens: list[int]
    cache_salt: str
    request_type: str  # the name of the model that took the body
    is_last: bool  # in the body: where that is cut, it may go on


def prompt_of(body: bytes, tokenizer: Tokenizer, max_bytes: int) -> Prompt | None:
    """None for a body that no endpoint takes.

    Of one that is cut, the prompt is what its beginning says, and right up to its last words.
    """
    try:
        content = parse(body, max_bytes, may_be_cut=True)
        for field, model in _REQUESTS if isinstance(content, dict) else ():
            for attempt in _attempts(content, field) if field in content else ():
                with suppress(ValidationError):
                    request = model.model_validate(attempt)
                    tokens = request.encode(tokenizer)
                    is_last = next(reversed(content)) == field
                    return Prompt(tokens, request.cache_salt, model.__name__, is_last)
    except (ApiError, ValueError):
        pass
    return None


def _attempts(content: dict[str, Any], field: str) -> Iterator[dict[str, Any]]:
    """What may be valid of a body: its last part may not be, if it is cut."""
    yield content
    last = next(reversed(content))
    if last != field:
        yield {name: value for name, value in content.items() if name != last}
    elif isinstance(content[field], list):
        yield content | {field: content[field][:-1]}
