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
        check_model(front, request)
        params = sampling_params(front, request)
        prompts = [
            await front.encode(prompt) if isinstance(prompt, str) else prompt
            for prompt in request.prompts
        ]
        for prompt in prompts:
            check_prompt(front, prompt, params, "prompt")
        streams = [front.generate(prompt, params, request.cache_salt) for prompt in prompts]
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": front.model_name,
        }
        num_prompt = sum(map(len, prompts))
        if request.stream:
            return event_stream(_events(head, streams, num_prompt, request.include_usage))
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(collect(stream)) for stream in streams]
        outputs = [task.result() for task in tasks]
        return JSONResponse(
            head
            | {"choices": [_choice(i, o) for i, o in enumerate(outputs)]}
            | {"usage": _usage(num_prompt, outputs)}
        )

    return router


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
