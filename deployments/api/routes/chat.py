"""POST /v1/chat/completions."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from deployments.api.admission import (
    check_model,
    check_prompt,
    check_queue,
    prompt_error,
    request_options,
    sampling_params,
    usage,
)
from deployments.api.bodies import BodyRoute
from deployments.api.schema import answers
from deployments.api.schema.answer_parser import AnswerParser
from deployments.api.schema.answers import documented
from deployments.api.schema.openai_logprobs import chat_logprobs, prompt_logprobs
from deployments.api.schema.protocol import ChatCompletionRequest
from deployments.api.schema.tools import ForcedCall, find_format, forced_call
from deployments.api.scope import scope
from deployments.api.streaming import (
    Chunks,
    await_first,
    event,
    event_stream,
    merge,
)
from deployments.api.whole import Output, Whole, collect_all
from deployments.front.front import Front, TextDelta, TextStream
from deployments.front.request_options import RequestOptions
from deployments.parsing import CLOSE, OPEN, OutputParser, Piece, ToolFormat
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
    return Whole(outputs, partial(_answer, chat, said))


def _answer(chat: "Chat", said: list[list[Piece]], outputs: list[Output]) -> dict[str, Any]:
    answer = chat.head | {
        "object": "chat.completion",
        "choices": [
            {
                "index": index,
                "message": AnswerParser.message(pieces),
                "logprobs": _logprobs(chat.front, output),
                "finish_reason": output.finish_reason,
                "stop_reason": output.stop_reason,
            }
            for index, (pieces, output) in enumerate(zip(said, outputs, strict=True))
        ],
        "usage": _usage(len(chat.prompt), outputs),
    }
    if chat.request.prompt_logprobs is None:
        return answer
    taken = outputs[0].prompt_logprobs or []
    return answer | {"prompt_logprobs": prompt_logprobs(chat.front.tokenizer, taken)}


@dataclass(frozen=True)
class Chat:
    """A chat request on its way: checked, in tokens, with what its answers are read with."""

    front: Front
    request: ChatCompletionRequest
    prompt: list[int]
    params: SamplingParams
    head: dict[str, Any]  # what all answers begin with
    tools: ToolFormat | None  # how it may call them; None if it may not
    forced: ForcedCall | None
    options: RequestOptions

    @classmethod
    async def start(cls, front: Front, request: ChatCompletionRequest) -> "Chat":
        """Raises ApiError for a request that cannot be served."""
        check_model(front, request)
        check_queue(front, 1)
        options = request_options(front, request)
        params = await sampling_params(front, request)
        tools: ToolFormat | None = None
        forced = None
        if request.offered_tools:
            tools = find_format(front)
            forced = forced_call(request.offered_tools, request.tool_choice, tools)
            if forced is not None:
                params = forced.constrain(params)
            elif params.structured_outputs is not None:
                tools = None
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
        return cls(front, request, prompt, params, head, tools, forced, options)

    @property
    def has_grammar(self) -> bool:
        """Whether a grammar, which the engine may yet refuse, shapes all of the answer."""
        return self.params.structured_outputs is not None

    @property
    def may_think(self) -> bool:
        return self.front.has_reasoning and not self.has_grammar

    def streams(self) -> list[TextStream]:
        """The text to come for each choice, with the marks that its parser looks for."""
        marks: tuple[str, ...] = (OPEN, CLOSE) if self.may_think else ()
        ends_early = False
        if self.tools is not None:
            marks += self.tools.marks
            ends_early = not self.request.parallel_tool_calls
        options = replace(
            self.options,
            stream=self.options.stream or ends_early,
            shown_tokens=self.front.tokens_of(marks),
        )
        return self.front.generate_choices(self.prompt, self.params, options)

    def new_parser(self) -> AnswerParser:
        """For one choice."""
        if self.tools is None and not self.may_think:
            return AnswerParser()
        return AnswerParser(
            OutputParser(
                _opens_reasoning(self.front, self.prompt) if self.may_think else None,
                self.tools,
                single_call=not self.request.parallel_tool_calls,
                forced_prefix=self.forced.prefix if self.forced is not None else None,
            )
        )


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
        raise prompt_error(error, "messages") from error


def _beginning(front: Front, prompt: list[int], forced: ForcedCall | None) -> list[int]:
    """What an answer of a given form begins with: no thoughts, and the mark of a forced call."""
    close = f"\n{CLOSE}\n\n" if _opens_reasoning(front, prompt) else ""
    prefix = forced.prefix if forced is not None else ""
    return front.tokenizer.encode(close + prefix, add_special_tokens=False)


def _opens_reasoning(front: Front, prompt: list[int]) -> bool:
    """Whether the template has begun a think block for the model."""
    end = front.tokenizer.decode(prompt[-_END_TOKENS:], skip_special_tokens=False)
    return front.has_reasoning and end.rstrip().endswith(OPEN)


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


async def read(stream: TextStream, parser: AnswerParser) -> AsyncGenerator[Step]:
    """A choice's stream, up to where its parser says that all has been said."""
    async with aclosing(stream):
        async for delta in stream:
            reason = delta.finish_reason
            pieces = parser.pieces(delta.text, last=reason is not None)
            if parser.is_over:
                reason = "stop"
                with suppress(StopAsyncIteration):
                    await stream.asend(True)
            yield Step(pieces, delta, parser.finish_reason(reason))
            if parser.is_over:
                return


async def _heard(steps: AsyncGenerator[Step], pieces: list[Piece]) -> AsyncGenerator[TextDelta]:
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
