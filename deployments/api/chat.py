"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from deployments.api.common import check_model, check_prompt, sampling_params, usage
from deployments.api.errors import ApiError
from deployments.api.logprobs import chat_logprobs, prompt_logprobs
from deployments.api.protocol import ChatCompletionRequest
from deployments.api.streaming import Output, collect_all, event, event_stream, merge
from deployments.front import Front, TextDelta


def routes(front: Front) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(request: ChatCompletionRequest) -> Response:
        if not request.stream:
            return JSONResponse(await complete_chat(front, request))
        head, prompt, streams = await _start(front, request)
        return event_stream(_events(front, head, streams, len(prompt), request))

    return router


async def complete_chat(front: Front, request: ChatCompletionRequest) -> dict[str, Any]:
    """The whole answer. Raises ApiError for a request that cannot be served."""
    head, prompt, streams = await _start(front, request)
    outputs = await collect_all(streams)
    answer = head | {
        "object": "chat.completion",
        "choices": [_choice(front, i, output) for i, output in enumerate(outputs)],
        "usage": _usage(len(prompt), outputs),
    }
    if request.prompt_logprobs is None:
        return answer
    taken = outputs[0].prompt_logprobs or []
    return answer | {"prompt_logprobs": prompt_logprobs(front.tokenizer, taken)}


def _choice(front: Front, index: int, output: Output) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": output.text, "refusal": None},
        "logprobs": _logprobs(front, output),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def _logprobs(front: Front, output: Output | TextDelta) -> dict[str, Any] | None:
    return None if output.logprobs is None else chat_logprobs(front.tokenizer, output.logprobs)


def _usage(num_prompt: int, outputs: Sequence[Output | TextDelta]) -> dict[str, Any]:
    num_output = sum(output.num_tokens for output in outputs)
    return usage(num_prompt, num_output, outputs[0].num_cached_tokens)


async def _start(
    front: Front, request: ChatCompletionRequest
) -> tuple[dict[str, Any], list[int], list[AsyncGenerator[TextDelta]]]:
    """(what all answers begin with, prompt tokens, the text to come for each choice)"""
    check_model(front, request)
    params = sampling_params(front, request)
    prompt = front.truncate(await _encode(front, request), params)
    check_prompt(front, prompt, params, "messages")
    head = {
        "id": f"chatcmpl-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": front.model_name,
    }
    streams = front.generate_choices(prompt, params, request.cache_salt, request.stream)
    return head, prompt, streams


async def _encode(front: Front, request: ChatCompletionRequest) -> list[int]:
    try:
        return await front.encode_chat(
            [message.for_template() for message in request.messages],
            **request.template_options(),
        )
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from error


async def _events(
    front: Front,
    head: dict[str, Any],
    streams: list[AsyncGenerator[TextDelta]],
    num_prompt: int,
    request: ChatCompletionRequest,
) -> AsyncGenerator[str]:
    head = head | {"object": "chat.completion.chunk"}

    def chunk(index: int, content: dict[str, Any], delta: TextDelta | None = None) -> str:
        choice = {
            "index": index,
            "delta": content,
            "logprobs": _logprobs(front, delta) if delta else None,
            "finish_reason": delta.finish_reason if delta else None,
        }
        return event(head | {"choices": [choice]})

    for index in range(len(streams)):
        yield chunk(index, {"role": "assistant", "content": ""})
    last: dict[int, TextDelta] = {}
    async for index, delta in merge(streams):
        last[index] = delta
        if delta.text or delta.finish_reason or delta.logprobs:
            yield chunk(index, {"content": delta.text} if delta.text else {}, delta)
    if request.include_usage:
        counts = _usage(num_prompt, [last[index] for index in range(len(streams))])
        yield event(head | {"choices": [], "usage": counts})
