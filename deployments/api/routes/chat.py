"""POST /v1/chat/completions."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

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
    await_first,
    event,
    event_stream,
    merge,
)
from deployments.api.whole import Output, Whole, collect_all
from deployments.front.front import Front, TextDelta
from deployments.parsing import Piece, Reasoning


def routes(front: Front) -> APIRouter:
    router = APIRouter(route_class=BodyRoute)

    @router.post(
        "/v1/chat/completions",
        response_model=None,
        responses=documented(answers.ChatCompletion, streams=True),
    )
    async def create_chat_completion(request: ChatCompletionRequest) -> Response:
        if not request.stream:
            return await (await complete_chat(front, request)).response()
        chat = await Chat.start(front, request)
        return event_stream(await await_first(_events(chat)) if chat.has_grammar else _events(chat))

    return router


async def complete_chat(front: Front, request: ChatCompletionRequest) -> Whole:
    """Raises ApiError for a request that cannot be served."""
    chat = await Chat.start(front, request)
    said: list[list[Piece]] = [[] for _ in range(chat.params.n)]
    outputs = await collect_all(
        [
            _heard(read(stream, chat.new_parser()), pieces)
            for stream, pieces in zip(chat.streams(), said, strict=True)
        ]
    )
    num_thinking = await _count_thoughts(chat, [piece for own in said for piece in own])
    return Whole(outputs, partial(_answer, chat, said, num_thinking))


def _answer(
    chat: Chat, said: list[list[Piece]], num_thinking: int, outputs: list[Output]
) -> dict[str, Any]:
    answer = chat.head | {
        "object": "chat.completion",
        "choices": [
            {
                "index": index,
                "message": AnswerParser.message(pieces),
                "logprobs": _logprobs(chat, output),
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
                **({"token_ids": output.token_ids} if chat.request.return_token_ids else {}),
            }
            for index, (pieces, output) in enumerate(zip(said, outputs, strict=True))
        ],
        "usage": _whole_usage(chat, outputs, num_thinking),
    }
    if chat.request.return_token_ids:
        answer["prompt_token_ids"] = chat.prompt
    if chat.request.prompt_logprobs is None:
        return answer
    taken = outputs[0].prompt_logprobs or []
    return answer | {"prompt_logprobs": prompt_logprobs(chat.front.tokenizer, taken)}


def _logprobs(chat: Chat, output: Output | TextDelta) -> dict[str, Any] | None:
    if output.logprobs is None:
        return None
    as_ids = chat.request.return_tokens_as_token_ids
    return chat_logprobs(chat.front.tokenizer, output.logprobs, as_ids)


def _usage(num_prompt: int, outputs: Sequence[Output | TextDelta]) -> dict[str, Any]:
    num_output = sum(output.num_tokens for output in outputs)
    return usage(num_prompt, num_output, outputs[0].num_cached_tokens if outputs else 0)


def _whole_usage(
    chat: Chat, outputs: Sequence[Output | TextDelta], num_thinking: int
) -> dict[str, Any]:
    """With how much of it was thought."""
    details = {"reasoning_tokens": num_thinking}
    return _usage(len(chat.prompt), outputs) | {"completion_tokens_details": details}


async def _count_thoughts(chat: Chat, said: Iterable[Piece]) -> int:
    return await chat.count_tokens(
        "".join(piece.text for piece in said if isinstance(piece, Reasoning))
    )


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
        token_ids: Sequence[int] | None = None,
    ) -> str:
        choice: dict[str, Any] = {
            "index": index,
            "delta": content,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        if finish_reason is not None:
            choice["stop_reason"] = last[index].stop_reason
        if token_ids is not None:
            choice["token_ids"] = token_ids
        counts = None
        if chat.request.continuous_usage:
            so_far = last.get(index)
            counts = _usage(len(chat.prompt), [so_far] if so_far else [])
        return chunks.event(choice, counts)

    streams = [read(stream, chat.new_parser()) for stream in chat.streams()]
    opening: dict[str, Any] = {"role": "assistant", "content": ""}
    last: dict[int, TextDelta] = {}
    thoughts: list[Piece] = []
    async with aclosing(merge(streams)) as steps:
        async for news in steps:
            events = [] if last else [chunk(i, opening) for i in range(len(streams))]
            if not last and chat.request.return_token_ids:
                events.insert(0, event(head | {"choices": [], "prompt_token_ids": chat.prompt}))
            for index, step in news:
                last[index] = step.delta
                logprobs = _logprobs(chat, step.delta)
                token_ids = list(step.delta.token_ids) if chat.request.return_token_ids else None
                for piece in step.pieces:
                    content = AnswerParser.delta(piece)
                    events.append(chunk(index, content, logprobs, token_ids=token_ids))
                    logprobs = token_ids = None
                    if isinstance(piece, Reasoning):
                        thoughts.append(piece)
                if logprobs is not None or token_ids is not None or step.finish_reason is not None:
                    events.append(chunk(index, {}, logprobs, step.finish_reason, token_ids))
            if events:
                yield "".join(events)
    if chat.request.include_usage:
        outputs = [last[index] for index in range(len(streams))]
        counts = _whole_usage(chat, outputs, await _count_thoughts(chat, thoughts))
        yield event(head | {"choices": [], "usage": counts})
