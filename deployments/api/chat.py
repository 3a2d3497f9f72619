"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from deployments.api import answers
from deployments.api.answers import documented
from deployments.api.bodies import BodyRoute
from deployments.api.common import (
    check_model,
    check_prompt,
    check_queue,
    request_options,
    sampling_params,
    usage,
)
from deployments.api.errors import ApiError
from deployments.api.logprobs import chat_logprobs, prompt_logprobs
from deployments.api.messages import AnswerParser
from deployments.api.protocol import ChatCompletionRequest
from deployments.api.scope import scope
from deployments.api.streaming import (
    Chunks,
    Output,
    begun,
    collect_all,
    event,
    event_stream,
    merge,
)
from deployments.api.tools import ForcedCall, find_format, forced_call
from deployments.front import Front, TextDelta
from deployments.parsing import OutputParser, Piece, ReasoningSplitter
from deployments.parsing.reasoning import CLOSE, OPEN
from deployments.request_record import RequestOptions
from engine.sampling_params import SamplingParams

# Tokens at a prompt's end that show whether it opens a think block.
_END_TOKENS = 8


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
        return event_stream(await begun(_events(chat)) if chat.has_form else _events(chat))

    return router


async def complete_chat(front: Front, request: ChatCompletionRequest) -> dict[str, Any]:
    """The whole answer. Raises ApiError for a request that cannot be served."""
    chat = await Chat.start(front, request)
    outputs = await collect_all(chat.streams())
    answer = chat.head | {
        "object": "chat.completion",
        "choices": [_choice(chat, i, output) for i, output in enumerate(outputs)],
        "usage": _usage(len(chat.prompt), outputs),
    }
    if request.prompt_logprobs is None:
        return answer
    taken = outputs[0].prompt_logprobs or []
    return answer | {"prompt_logprobs": prompt_logprobs(front.tokenizer, taken)}


@dataclass(frozen=True)
class Chat:
    """A chat request on its way: checked, in tokens, with what its answers are read with."""

    front: Front
    request: ChatCompletionRequest
    prompt: list[int]
    params: SamplingParams
    head: dict[str, Any]  # what all answers begin with
    forced: ForcedCall | None
    options: RequestOptions

    @classmethod
    async def start(cls, front: Front, request: ChatCompletionRequest) -> "Chat":
        """Raises ApiError for a request that cannot be served."""
        check_model(front, request)
        check_queue(front, 1)
        options = request_options(front, request)
        params = sampling_params(front, request)
        forced = None
        if request.offered_tools:
            tool_format = find_format(front)
            forced = forced_call(request.offered_tools, request.tool_choice, tool_format)
            if tool_format.has_special_tokens:
                params = params.model_copy(update={"skip_special_tokens": False})
            if forced is not None:
                params = forced.constrain(params)
        prompt = await _encode(front, request, params)
        if params.structured_outputs is not None:
            prompt += _beginning(front, prompt, forced)
        prompt = front.truncate(prompt, params)
        check_prompt(front, prompt, params, "messages")
        check_queue(front, params.n, len(prompt) * params.n)
        scope().end_reading()
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": front.model_name,
        }
        return cls(front, request, prompt, params, head, forced, options)

    @property
    def has_form(self) -> bool:
        """Whether a grammar, which the engine may yet refuse, shapes all of the answer."""
        return self.params.structured_outputs is not None

    def streams(self) -> list[AsyncGenerator[TextDelta]]:
        """The text to come for each choice."""
        return self.front.generate_choices(self.prompt, self.params, self.options)

    def new_parser(self) -> AnswerParser:
        """For one choice."""
        if self.has_form and self.forced is None:
            return AnswerParser()
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
    front: Front, request: ChatCompletionRequest, params: SamplingParams
) -> list[int]:
    try:
        return await front.encode_chat(
            [message.for_template() for message in request.messages],
            max_len=front.max_prompt_len(params),
            **request.template_options(),
        )
    except ValueError as error:
        raise ApiError(400, str(error), "messages") from error


def _beginning(front: Front, prompt: list[int], forced: ForcedCall | None) -> list[int]:
    """What an answer of a given form begins with: no thoughts, and the mark of a forced call."""
    close = f"\n{CLOSE}\n\n" if _opens_reasoning(front, prompt) else ""
    prefix = forced.prefix if forced is not None else ""
    return front.tokenizer.encode(close + prefix, add_special_tokens=False)


def _opens_reasoning(front: Front, prompt: list[int]) -> bool:
    """Whether the template has begun a think block for the model."""
    end = front.tokenizer.decode(prompt[-_END_TOKENS:], skip_special_tokens=False)
    return front.has_reasoning and end.rstrip().endswith(OPEN)


def _choice(chat: Chat, index: int, output: Output) -> dict[str, Any]:
    parser = chat.new_parser()
    return {
        "index": index,
        "message": parser.message(output.text),
        "logprobs": _logprobs(chat.front, output),
        "finish_reason": parser.finish_reason(output.finish_reason),
        "stop_reason": output.stop_reason,
    }


def _logprobs(front: Front, output: Output | TextDelta) -> dict[str, Any] | None:
    return None if output.logprobs is None else chat_logprobs(front.tokenizer, output.logprobs)


def _usage(num_prompt: int, outputs: Sequence[Output | TextDelta]) -> dict[str, Any]:
    num_output = sum(output.num_tokens for output in outputs)
    return usage(num_prompt, num_output, outputs[0].num_cached_tokens if outputs else 0)


@dataclass(frozen=True, slots=True)
class Step:
    """What a step brought a choice, read."""

    pieces: list[Piece]
    delta: TextDelta
    finish_reason: str | None


async def read(stream: AsyncGenerator[TextDelta], parser: AnswerParser) -> AsyncGenerator[Step]:
    """A choice's stream, up to where its parser says that all has been said."""
    async with aclosing(stream):
        async for delta in stream:
            reason = delta.finish_reason
            pieces = parser.pieces(delta.text, last=reason is not None)
            if parser.is_over:
                reason = "stop"
            yield Step(pieces, delta, parser.finish_reason(reason))
            if parser.is_over:
                return


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
