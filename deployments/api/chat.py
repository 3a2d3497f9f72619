"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from deployments.api.common import check_model, check_prompt, sampling_params, usage
from deployments.api.errors import ApiError
from deployments.api.messages import AnswerParser
from deployments.api.protocol import ChatCompletionRequest
from deployments.api.streaming import collect, event, event_stream
from deployments.api.tools import ForcedCall, find_format, forced_call
from deployments.front import Front, TextDelta
from deployments.parsing import OutputParser, ReasoningSplitter
from deployments.parsing.reasoning import CLOSE, OPEN
from engine.sampling_params import SamplingParams

# Tokens at a prompt's end that show whether it opens a think block.
_END_TOKENS = 8


def routes(front: Front) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(request: ChatCompletionRequest) -> Response:
        if not request.stream:
            return JSONResponse(await complete_chat(front, request))
        chat = await Chat.start(front, request)
        return event_stream(_events(chat, chat.deltas(), request.include_usage))

    return router


async def complete_chat(front: Front, request: ChatCompletionRequest) -> dict[str, Any]:
    """The whole answer. Raises ApiError for a request that cannot be served."""
    chat = await Chat.start(front, request)
    output = await collect(chat.deltas())
    parser = chat.new_parser()
    choice = {
        "index": 0,
        "message": parser.message(output.text),
        "logprobs": None,
        "finish_reason": parser.finish_reason(output.finish_reason),
        "stop_reason": output.stop_reason,
    }
    counts = usage(chat.num_prompt, output.num_tokens, output.num_cached_tokens)
    return chat.head | {"object": "chat.completion", "choices": [choice], "usage": counts}


@dataclass(frozen=True)
class Chat:
    """A chat request on its way: checked, in tokens, with what its answers are read with."""

    front: Front
    request: ChatCompletionRequest
    prompt: list[int]
    params: SamplingParams
    head: dict[str, Any]  # what all answers begin with
    forced: ForcedCall | None

    @classmethod
    async def start(cls, front: Front, request: ChatCompletionRequest) -> "Chat":
        """Raises ApiError for a request that cannot be served."""
        check_model(front, request)
        params = sampling_params(front, request)
        forced = None
        if request.offered_tools:
            tool_format = find_format(front)
            forced = forced_call(request.offered_tools, request.tool_choice, tool_format)
            if tool_format.has_special_tokens:
                params = params.model_copy(update={"skip_special_tokens": False})
            if forced is not None:
                params = forced.constrain(params)
        prompt = await _encode(front, request, forced)
        check_prompt(front, prompt, params, "messages")
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": front.model_name,
        }
        return cls(front, request, prompt, params, head, forced)

    @property
    def num_prompt(self) -> int:
        return len(self.prompt)

    def deltas(self) -> AsyncGenerator[TextDelta]:
        """The text to come."""
        request = self.request
        return self.front.generate(self.prompt, self.params, request.cache_salt, request.stream)

    def new_parser(self) -> AnswerParser:
        """For one choice."""
        tools = find_format(self.front).parser() if self.request.offered_tools else None
        thinks = self.front.has_reasoning and self.forced is None
        if tools is None and not thinks:
            return AnswerParser()
        if tools is not None and self.forced is not None:
            tools.push(self.forced.prefix, last=False)
        reasoning = ReasoningSplitter(_opens_reasoning(self.front, self.prompt)) if thinks else None
        parser = OutputParser(reasoning, tools, not self.request.parallel_tool_calls)
        return AnswerParser(parser, self.front.end_texts if tools is not None else ())


async def _encode(
    front: Front, request: ChatCompletionRequest, forced: ForcedCall | None
) -> list[int]:
    try:
        prompt = await front.encode_chat(
            [message.for_template() for message in request.messages],
            **request.template_options(),
        )
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from error
    if forced is not None:
        close = f"\n{CLOSE}\n\n" if _opens_reasoning(front, prompt) else ""
        prompt += front.tokenizer.encode(close + forced.prefix, add_special_tokens=False)
    return prompt


def _opens_reasoning(front: Front, prompt: list[int]) -> bool:
    """Whether the template has begun a think block for the model."""
    end = front.tokenizer.decode(prompt[-_END_TOKENS:], skip_special_tokens=False)
    return front.has_reasoning and end.rstrip().endswith(OPEN)


async def _events(
    chat: Chat, deltas: AsyncGenerator[TextDelta], with_usage: bool
) -> AsyncGenerator[str]:
    head = chat.head | {"object": "chat.completion.chunk"}
    parser = chat.new_parser()

    def chunk(content: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": content, "logprobs": None, "finish_reason": finish_reason}
        return event(head | {"choices": [choice]})

    yield chunk({"role": "assistant", "content": ""})
    async with aclosing(deltas):
        async for delta in deltas:
            reason = delta.finish_reason
            for content in parser.deltas(delta.text, last=reason is not None):
                yield chunk(content)
            if parser.is_over:
                reason = "stop"
            if reason is not None:
                yield chunk({}, parser.finish_reason(reason))
                break
    if with_usage:
        counts = usage(chat.num_prompt, delta.num_tokens, delta.num_cached_tokens)
        yield event(head | {"choices": [], "usage": counts})
