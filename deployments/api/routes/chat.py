"""POST /v1/chat/completions."""

from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from deployments.api.admission import metrics, usage
from deployments.api.bodies import BodyRoute
from deployments.api.chat import AnswerDelta, Chat
from deployments.api.requests.resume import event_id, given_resume
from deployments.api.schema import answers
from deployments.api.schema.answer_parser import AnswerParser
from deployments.api.schema.answers import documented
from deployments.api.schema.openai_logprobs import chat_logprobs, prompt_logprobs
from deployments.api.schema.protocol import ChatCompletionRequest
from deployments.api.streaming import Chunks, EventStream, event, once_accepted
from deployments.api.whole import Output, Whole
from deployments.front.front import Front
from deployments.front.generation import TextDelta
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
        chat = await Chat.start(front, request, given_resume(request.resume))
        return EventStream(await once_accepted(_events(chat), chat.params))

    return router


async def complete_chat(front: Front, request: ChatCompletionRequest) -> Whole:
    """Raises ApiError for a request that cannot be served."""
    chat = await Chat.start(front, request, request.resume)
    outputs = [Output() for _ in range(chat.params.n)]
    said: list[list[Piece]] = [[] for _ in outputs]
    async with aclosing(chat.answers()) as answers:
        async for news in answers:
            for index, step in news:
                said[index] += step.pieces
                outputs[index].add(step.delta, step.finish_reason)
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
                "message": AnswerParser.message(_told(chat, pieces)),
                "logprobs": _logprobs(chat, output),
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
                **({"token_ids": output.token_ids} if chat.request.return_token_ids else {}),
            }
            for index, (pieces, output) in enumerate(zip(said, outputs, strict=True))
        ],
        "usage": _whole_usage(chat, outputs, num_thinking),
        **metrics(chat.request, chat.options),
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
    """With how much of it was thought, and predicted."""
    predicted = [record.num_predicted for record in chat.options.records]
    details = {
        "reasoning_tokens": num_thinking,
        "accepted_prediction_tokens": sum(accepted for accepted, _ in predicted),
        "rejected_prediction_tokens": sum(rejected for _, rejected in predicted),
    }
    return _usage(len(chat.prompt), outputs) | {"completion_tokens_details": details}


def _told(chat: Chat, pieces: list[Piece]) -> list[Piece]:
    """All that the client wants of them."""
    if chat.request.include_reasoning:
        return pieces
    return [piece for piece in pieces if not isinstance(piece, Reasoning)]


async def _count_thoughts(chat: Chat, said: Iterable[Piece]) -> int:
    return await chat.count_tokens(
        "".join(piece.text for piece in said if isinstance(piece, Reasoning))
    )


class _ChatChunks(Chunks):
    """A chat's events."""

    def __init__(self, chat: Chat) -> None:
        self.head = chat.head | {"object": "chat.completion.chunk"}
        super().__init__(self.head)
        self._chat = chat

    def opening(self, num_choices: int) -> list[str]:
        message = {"role": "assistant", "content": ""}
        events = [self._chunk(index, message, None) for index in range(num_choices)]
        if self._chat.request.return_token_ids:
            prompt = {"choices": [], "prompt_token_ids": self._chat.prompt}
            events.insert(0, event(self.head | prompt))
        return events

    def step(self, index: int, step: AnswerDelta) -> list[str]:
        delta, events, pieces = step.delta, [], _told(self._chat, step.pieces)
        if delta.is_known:
            delta, pieces = delta.end_alone(), []
        logprobs = _logprobs(self._chat, delta)
        token_ids = list(delta.token_ids) if self._chat.request.return_token_ids else None
        for piece in pieces:
            content = AnswerParser.delta(piece)
            events.append(self._chunk(index, content, delta, logprobs, token_ids=token_ids))
            logprobs = token_ids = None
        is_rest = logprobs is not None or token_ids is not None
        if step.finish_reason is not None or (is_rest and not delta.is_known):
            ending = step.finish_reason
            events.append(self._chunk(index, {}, delta, logprobs, ending, token_ids))
        return events

    def _chunk(
        self,
        index: int,
        content: dict[str, Any],
        delta: TextDelta | None,
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
        if finish_reason is not None and delta is not None:
            choice["stop_reason"] = delta.stop_reason
        if token_ids is not None:
            choice["token_ids"] = token_ids
        counts = None
        if self._chat.request.continuous_usage:
            counts = _usage(len(self._chat.prompt), [delta] if delta else [])
        return self.event(choice, counts)


async def _events(chat: Chat) -> AsyncGenerator[str]:
    """One text for all that has come, however many events it has: each is one write."""
    chunks = _ChatChunks(chat)
    num_choices = chat.params.n
    last: dict[int, TextDelta] = {}
    thoughts: list[Piece] = []
    async with aclosing(chat.answers()) as answers:
        async for news in answers:
            events: list[str] = []
            for index, step in news:
                is_first = not last and chat.options.position is None
                opening = chunks.opening(num_choices) if is_first else []
                own = chunks.step(index, step)
                if num_choices == 1:
                    for part, position in ((opening, 0), (own, step.delta.num_tokens)):
                        if part:
                            part[-1] = event_id(chat.params, position) + part[-1]
                events += opening + own
                last[index] = step.delta
                thoughts += [piece for piece in step.pieces if isinstance(piece, Reasoning)]
            if events:
                yield "".join(events)
    ending = metrics(chat.request, chat.options)
    if chat.request.include_usage:
        outputs = [last[index] for index in range(num_choices)]
        ending["usage"] = _whole_usage(chat, outputs, await _count_thoughts(chat, thoughts))
    if ending:
        yield event(chunks.head | {"choices": []} | ending)
