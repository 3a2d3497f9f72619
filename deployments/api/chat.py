"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from deployments.api.common import check_model, check_prompt, sampling_params, usage
from deployments.api.errors import ApiError
from deployments.api.protocol import ChatCompletionRequest
from deployments.api.streaming import collect, event, event_stream
from deployments.front import Front, TextDelta


def routes(front: Front) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(request: ChatCompletionRequest) -> Response:
        if not request.stream:
            return JSONResponse(await complete_chat(front, request))
        head, prompt, deltas = await _start(front, request)
        return event_stream(_events(head, deltas, len(prompt), request.include_usage))

    return router


async def complete_chat(front: Front, request: ChatCompletionRequest) -> dict[str, Any]:
    """The whole answer. Raises ApiError for a request that cannot be served."""
    head, prompt, deltas = await _start(front, request)
    output = await collect(deltas)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": output.text, "refusal": None},
        "logprobs": None,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    counts = usage(len(prompt), output.num_tokens, output.num_cached_tokens)
    return head | {"object": "chat.completion", "choices": [choice], "usage": counts}


async def _start(
    front: Front, request: ChatCompletionRequest
) -> tuple[dict[str, Any], list[int], AsyncGenerator[TextDelta]]:
    """(what all answers begin with, prompt tokens, the text to come)"""
    check_model(front, request)
    params = sampling_params(front, request)
    prompt = await _encode(front, request)
    check_prompt(front, prompt, params, "messages")
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": front.model_name,
    }
    deltas = front.generate(prompt, params, request.cache_salt, request.stream)
    return head, prompt, deltas


async def _encode(front: Front, request: ChatCompletionRequest) -> list[int]:
    try:
        return await front.encode_chat(
            [message.for_template() for message in request.messages],
            **request.template_options(),
        )
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from error


async def _events(
    head: dict[str, Any], deltas: AsyncGenerator[TextDelta], num_prompt: int, with_usage: bool
) -> AsyncGenerator[str]:
    head = head | {"object": "chat.completion.chunk"}

    def chunk(content: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": content, "logprobs": None, "finish_reason": finish_reason}
        return event(head | {"choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    async for delta in deltas:
        if delta.text or delta.finish_reason:
            yield chunk({"content": delta.text} if delta.text else {}, delta.finish_reason)
    if with_usage:
        counts = usage(num_prompt, delta.num_tokens, delta.num_cached_tokens)
        yield event(head | {"choices": [], "usage": counts})
