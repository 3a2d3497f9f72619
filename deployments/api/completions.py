"""POST /v1/completions."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from deployments.api.common import check_model, check_prompt, sampling_params, usage
from deployments.api.protocol import CompletionRequest
from deployments.api.streaming import Output, collect, event, event_stream, merge
from deployments.front import Front, TextDelta


def routes(front: Front) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def create_completion(request: CompletionRequest) -> Response:
        if not request.stream:
            return JSONResponse(await complete_text(front, request))
        head, num_prompt, streams = await _start(front, request)
        return event_stream(_events(head, streams, num_prompt, request.include_usage))

    return router


async def complete_text(front: Front, request: CompletionRequest) -> dict[str, Any]:
    """The whole answer. Raises ApiError for a request that cannot be served."""
    head, num_prompt, streams = await _start(front, request)
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(collect(stream)) for stream in streams]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # one answer has one error
    outputs = [task.result() for task in tasks]
    return (
        head
        | {"choices": [_choice(i, o) for i, o in enumerate(outputs)]}
        | {"usage": _usage(num_prompt, outputs)}
    )


async def _start(
    front: Front, request: CompletionRequest
) -> tuple[dict[str, Any], int, list[AsyncGenerator[TextDelta]]]:
    """(what all answers begin with, number of prompt tokens, the text to come for each prompt)"""
    check_model(front, request)
    params = sampling_params(front, request)
    prompts = [
        await front.encode(prompt) if isinstance(prompt, str) else prompt
        for prompt in request.prompts
    ]
    for prompt in prompts:
        check_prompt(front, prompt, params, "prompt")
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": front.model_name,
    }
    streams = [
        front.generate(prompt, params, request.cache_salt, request.stream) for prompt in prompts
    ]
    return head, sum(map(len, prompts)), streams


def _choice(index: int, output: Output) -> dict[str, Any]:
    return {
        "index": index,
        "text": output.text,
        "logprobs": None,
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }


def _usage(num_prompt: int, outputs: list[Output] | list[TextDelta]) -> dict[str, Any]:
    return usage(
        num_prompt,
        sum(output.num_tokens for output in outputs),
        sum(output.num_cached_tokens for output in outputs),
    )


async def _events(
    head: dict[str, Any],
    streams: list[AsyncGenerator[TextDelta]],
    num_prompt: int,
    with_usage: bool,
) -> AsyncGenerator[str]:
    last: dict[int, TextDelta] = {}
    async for index, delta in merge(streams):
        last[index] = delta
        if delta.text or delta.finish_reason:
            choice = {
                "index": index,
                "text": delta.text,
                "logprobs": None,
                "finish_reason": delta.finish_reason,
            }
            yield event(head | {"choices": [choice]})
    if with_usage:
        yield event(head | {"choices": [], "usage": _usage(num_prompt, list(last.values()))})
