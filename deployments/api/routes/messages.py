"""POST /v1/messages, and /v1/messages/count_tokens: Anthropic's Messages API."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from deployments.api.admission import check_model, max_counted_tokens, prompt_error
from deployments.api.bodies import BodyRoute
from deployments.api.chat import AnswerDelta, Chat, as_chat
from deployments.api.errors import report
from deployments.api.schema.answers import documented
from deployments.api.schema.message_answers import AnthropicError, Message, TokensOfMessages
from deployments.api.schema.message_output import MessageOutput
from deployments.api.schema.message_request import (
    OTHER_NAMES,
    CountTokensRequest,
    MessagesRequest,
)
from deployments.api.schema.tools import left_out_header
from deployments.api.scope import scope
from deployments.api.streaming import EventStream, named_event, once_accepted
from deployments.front.front import Front


def routes(front: Front) -> APIRouter:
    router = APIRouter(route_class=BodyRoute)

    @router.post(
        "/v1/messages",
        response_model=None,
        responses=documented(Message, streams=True, error=AnthropicError),
    )
    async def create_message(request: MessagesRequest) -> Response:
        chat = await Chat.start(front, as_chat(request.to_chat, OTHER_NAMES))
        is_omitted = request.thinking is not None and request.thinking.display == "omitted"
        output = MessageOutput(front.model_name, shows_thinking=not is_omitted)
        events = _events(chat, output)
        headers = left_out_header(request.left_out)
        if request.stream:
            events = await once_accepted(events, chat.params)
            return EventStream(events, _failed, headers)
        async with aclosing(events):
            async for _ in events:
                pass
        return JSONResponse(output.message(), headers=headers)

    @router.post(
        "/v1/messages/count_tokens",
        response_model=None,
        responses=documented(TokensOfMessages, error=AnthropicError),
    )
    async def count_tokens(request: CountTokensRequest) -> Response:
        """The tokens of the prompt that the same request has."""
        check_model(front, request)
        chat = as_chat(request.to_chat, OTHER_NAMES)
        try:
            prompt = await front.encode_chat(
                [message.for_template() for message in chat.messages],
                max_len=max_counted_tokens(front),
                **chat.template_options(),
            )
        except ValueError as error:
            raise prompt_error(error, "messages") from error
        return JSONResponse({"input_tokens": len(prompt)})

    return router


async def _events(chat: Chat, output: MessageOutput) -> AsyncGenerator[str]:
    step: AnswerDelta | None = None
    has_begun = False
    async with aclosing(chat.answers()) as answers:
        async for steps in answers:
            for _, step in steps:
                news = [] if has_begun else [output.begin(_usage(chat, step, 0))]
                has_begun = True
                news += [e for piece in step.pieces for e in output.add(piece)]
                if news:
                    yield "".join(map(named_event, news))
    assert step is not None, "a stream has at least one delta"
    num_thinking = await chat.count_tokens(output.reasoning)
    usage = _usage(chat, step, num_thinking)
    yield "".join(map(named_event, output.end(_reason(chat, step), step.delta.stop_reason, usage)))


def _reason(chat: Chat, step: AnswerDelta) -> str | None:
    most = chat.params.max_tokens
    if step.finish_reason == "length" and most is not None and step.delta.num_tokens < most:
        return "model_context_window_exceeded"
    return step.finish_reason


def _failed(error: Exception | None) -> str:
    if error is None:
        return ""
    return named_event(report(error).anthropic_body(scope().request_id))


def _usage(chat: Chat, step: AnswerDelta, num_thinking: int) -> dict[str, Any]:
    """Of the prompt, what was found in the cache is not counted twice."""
    cached = step.delta.num_cached_tokens
    return {
        "input_tokens": len(chat.prompt) - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": step.delta.num_tokens,
        "output_tokens_details": {"thinking_tokens": num_thinking},
    }
