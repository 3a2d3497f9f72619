"""POST /v1/chat/completions."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from deployments.api.admission import usage
from deployments.api.bodies import BodyRoute
from deployments.api.chat import AnswerDelta, Chat, read
from deployments.api.schema import answers
from deployments.api.schema.answer_parser import AnswerParser
from deployments.api.schema.answers import documented
from deployments.api.schema.openai_logprobs import chat_logprobs, prompt_logprobs
from deployments.api.schema.protocol import ChatCompletionRequest
from deployments.api.streaming import (
    Chunks,
    Output,
    await_first,
    collect_all,
    event,
    event_stream,
    merge,
)
from deployments.front.front import Front, TextDelta
from deployments.parsing import Piece


def routes(front: Front) -> APIRouter:
    router = APIRouter(route_class=BodyRoute)

    @router.post(
        "/v1/chat/completions",
        response_model=None,
        responses=documented(answers.ChatCompletion, streams=True),
    )
    async def create_chat_completion(request: ChatCompletionRequest) -> Response:
        if not request.stream:
            return JSONResponse(await complete_chat(front, request))
        chat = await Chat.start(front, request)
        return event_stream(await await_first(_events(chat)) if chat.has_grammar else _events(chat))

    return router


async def complete_chat(front: Front, request: ChatCompletionRequest) -> dict[str, Any]:
    """The whole answer. Raises ApiError for a request that cannot be served."""
    chat = await Chat.start(front, request)
    said: list[list[Piece]] = [[] for _ in range(chat.params.n)]
    outputs = await collect_all(
        [
            _heard(read(stream, chat.new_parser()), pieces)
            for stream, pieces in zip(chat.streams(), said, strict=True)
        ]
    )
    answer = chat.head | {
        "object": "chat.completion",
        "choices": [
            {
                "index": index,
                "message": AnswerParser.message(pieces),
                "logprobs": _logprobs(front, output),
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
            }
            for index, (pieces, output) in enumerate(zip(said, outputs, strict=True))
        ],
        "usage": _usage(len(chat.prompt), outputs),
    }
    if request.prompt_logprobs is None:
        return answer
    taken = outputs[0].prompt_logprobs or []
    return answer | {"prompt_logprobs": prompt_logprobs(front.tokenizer, taken)}


def _logprobs(front: Front, output: Output | TextDelta) -> dict[str, Any] | None:
    return None if output.logprobs is None else chat_logprobs(front.tokenizer, output.logprobs)


def _usage(num_prompt: int, outputs: Sequence[Output | TextDelta]) -> dict[str, Any]:
    num_output = sum(output.num_tokens for output in outputs)
    return usage(num_prompt, num_output, outputs[0].num_cached_tokens if outputs else 0)


async def _heard(
    steps: AsyncGenerator[AnswerDelta], pieces: list[Piece]
) -> AsyncGenerator[TextDelta]:
    """A choice's stream, when its pieces are put away."""
    async with aclosing(steps):
        async for step in steps:
            pieces += step.pieces
            yield replace(step.delta, finish_reason=step.finish_reason)


async def _events(chat: Chat) -> AsyncGenerator[str]:
    """One text per step, however many events it has: each is one write."""
    head = chat.head | {"object": "chat.completion.chunk"}
    chunks = Chunks(head)

    def chunk(
        index: int,
        content: dict[str, Any],
        logprobs: dict[str, Any] | None = None,
        finish_reason: str | None = None,
    ) -> str:
        choice = {
            "index": index,
            "delta": content,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        if finish_reason is not None:
            choice["stop_reason"] = last[index].stop_reason
        counts = None
        if chat.request.continuous_usage:
            so_far = last.get(index)
            counts = _usage(len(chat.prompt), [so_far] if so_far else [])
        return chunks.event(choice, counts)

    streams = [read(stream, chat.new_parser()) for stream in chat.streams()]
    opening: dict[str, Any] = {"role": "assistant", "content": ""}
    last: dict[int, TextDelta] = {}
    async with aclosing(merge(streams)) as steps:
        async for news in steps:
            events = [] if last else [chunk(i, opening) for i in range(len(streams))]
            for index, step in news:
                last[index] = step.delta
                logprobs = _logprobs(chat.front, step.delta)
                for piece in step.pieces:
                    events.append(chunk(index, AnswerParser.delta(piece), logprobs))
                    logprobs = None
                if logprobs is not None or step.finish_reason is not None:
                    events.append(chunk(index, {}, logprobs, step.finish_reason))
            if events:
                yield "".join(events)
    if chat.request.include_usage:
        counts = _usage(len(chat.prompt), [last[index] for index in range(len(streams))])
        yield event(head | {"choices": [], "usage": counts})
