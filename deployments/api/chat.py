"""A chat on its way, whichever endpoint it came by: its prompt, and the answer as it is read."""

import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from deployments.api.admission import (
    check_model,
    check_prompt,
    check_queue,
    prompt_error,
    request_options,
    sampling_params,
)
from deployments.api.errors import ApiError, validation_error
from deployments.api.schema.answer_parser import AnswerParser
from deployments.api.schema.protocol import ChatCompletionRequest
from deployments.api.schema.tools import ForcedCall, find_format, forced_call
from deployments.api.scope import scope
from deployments.front.front import Front, TextDelta, TextStream
from deployments.front.request_record import RequestOptions
from deployments.parsing import CLOSE, OPEN, OutputParser, Piece, ToolFormat
from engine.sampling_params import SamplingParams
from engine.strict import explain

# Tokens at a prompt's end that show whether it opens a think block.
_END_TOKENS = 8


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
            "system_fingerprint": front.fingerprint,
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

    async def count_tokens(self, text: str) -> int:
        """Of a part of an answer."""
        return len(await self.front.encode(text, add_special_tokens=False)) if text else 0

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


def as_chat(
    to_chat: Callable[[], ChatCompletionRequest], other_names: Mapping[str, str]
) -> ChatCompletionRequest:
    """Another API's request as a chat; raises ApiError for what can be none.

    Args:
        other_names: what that API calls a chat's fields, for errors.
    """
    scope().names = dict(other_names)
    try:
        return to_chat()
    except ValidationError as error:
        raise validation_error(explain(error.errors())) from error
    except ValueError as error:
        raise ApiError(400, str(error), str(error).partition(":")[0]) from error


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


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What a step brought a choice, read."""

    pieces: list[Piece]
    delta: TextDelta
    finish_reason: str | None


async def read(stream: TextStream, parser: AnswerParser) -> AsyncGenerator[AnswerDelta]:
    """A choice's stream, up to where its parser says that all has been said."""
    async with aclosing(stream):
        async for delta in stream:
            reason = delta.finish_reason
            pieces = parser.pieces(delta.text, last=reason is not None)
            if parser.is_over:
                reason = "stop"
                with suppress(StopAsyncIteration):
                    await stream.asend(True)
            yield AnswerDelta(pieces, delta, parser.finish_reason(reason))
            if parser.is_over:
                return
