"""A chat on its way, whichever endpoint it came by: its prompt, and the answer as it is read."""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
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
from deployments.api.requests.resume import Resume, go_on
from deployments.api.schema.answer_parser import AnswerParser
from deployments.api.schema.protocol import ChatCompletionRequest
from deployments.api.schema.tools import call_grammar, constrain, find_format, forced_tools
from deployments.api.scope import scope
from deployments.front.front import Front
from deployments.front.generation import Generation, TextDelta
from deployments.front.request_options import RequestOptions
from deployments.off_loop import off_loop
from deployments.parsing import THINK, Functions, OutputParser, Piece, ToolFormat
from engine.sampling_params import SamplingParams, ThinkingLimit
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
    forced_prefix: str | None  # what the prompt ends with, if that begins a call
    is_shaped: bool  # whether a grammar shapes all of the answer
    options: RequestOptions

    @classmethod
    async def start(
        cls, front: Front, request: ChatCompletionRequest, resume: Resume | None = None
    ) -> "Chat":
        """Raises ApiError for a request that cannot be served."""
        check_model(front, request)
        check_queue(front, 1)
        options = request_options(front, request)
        params = await sampling_params(front, request)
        params, options = await go_on(resume, front, params, options)
        tools = find_format(front) if request.offered_tools else None
        has_form = params.structured_outputs is not None
        forced_prefix: str | None = None
        if tools is not None:
            if forced_tools(request.offered_tools, request.tool_choice):
                forced_prefix = tools.prefix
            params = _with_calls(front, request, params, tools)
        prompt = await _encode(front, request, params)
        is_shaped = has_form or forced_prefix is not None
        is_in_channel = tools is not None and tools.has_channels and forced_prefix is None
        if is_shaped and not is_in_channel:
            prompt += _beginning(front, _end_of(front, request, prompt), forced_prefix)
        prompt = front.truncate(prompt, params)
        options = replace(options, prediction=await _predicted(front, request, params))
        if not is_shaped:
            end = _end_of(front, request, prompt)
            params = _with_limit(front, end, params, request.thinking_budget)
        check_prompt(front, prompt, params, "messages", options.known_tokens)
        num_tokens = len(prompt) + len(options.known_tokens)
        check_queue(front, params.n, num_tokens * params.n)
        scope().end_reading()
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": front.model_name,
            "system_fingerprint": front.fingerprint,
        }
        return cls(front, request, prompt, params, head, tools, forced_prefix, is_shaped, options)

    @property
    def may_think(self) -> bool:
        return self.front.reasoning is not None and not self.is_shaped

    def answers(self) -> "Answers":
        """The choices to come, each with the marks in its text that its parser looks for."""
        reasoning = self.front.reasoning
        marks = reasoning.marks if reasoning is not None and self.may_think else ()
        ends_early = False
        if self.tools is not None:
            marks += self.tools.marks
            ends_early = not self.request.parallel_tool_calls
        options = replace(
            self.options,
            stream=self.options.stream or ends_early,
            by_token=ends_early,
            shown_tokens=frozenset(self.front.special_tokens(marks).values()),
        )
        generation = self.front.generate([self.prompt], self.params, options)
        return Answers(generation, [self._new_parser() for _ in range(self.params.n)])

    async def count_tokens(self, text: str) -> int:
        """How many tokens a part of an answer has."""
        return len(await self.front.encode(text, add_special_tokens=False)) if text else 0

    def _new_parser(self) -> AnswerParser:
        """What reads the text of one choice."""
        if self.tools is None and not self.may_think:
            return AnswerParser()
        reasoning = self.front.reasoning or THINK
        end = _end_of(self.front, self.request, self.prompt)
        return AnswerParser(
            OutputParser(
                reasoning.is_open(end) if self.may_think else None,
                self.tools,
                single_call=not self.request.parallel_tool_calls,
                forced_prefix=self.forced_prefix,
                functions=Functions(
                    tool.function.model_dump() for tool in self.request.offered_tools
                ),
                reasoning=reasoning,
                num_called=sum(len(message.tool_calls) for message in self.request.messages),
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


def _with_calls(
    front: Front, request: ChatCompletionRequest, params: SamplingParams, tools: ToolFormat
) -> SamplingParams:
    """The parameters with a grammar of calls: of a forced or strict one, or beside a form."""
    is_single, form = not request.parallel_tool_calls, params.structured_outputs
    offered = request.offered_tools
    if forced := forced_tools(offered, request.tool_choice):
        return constrain(params, call_grammar(front, tools, forced, is_forced=True).forced())
    if form is not None:
        return constrain(params, call_grammar(front, tools, offered).or_form(form, is_single))
    if any(tool.function.strict for tool in offered) and not tools.has_channels:
        marks = front.reasoning.marks if front.reasoning is not None else ()
        thoughts = list(front.special_tokens(marks).values())
        grammar = call_grammar(front, tools, offered).among_text(is_single, thoughts)
        return constrain(params, grammar)
    return params


async def _predicted(
    front: Front, request: ChatCompletionRequest, params: SamplingParams
) -> list[int]:
    if request.prediction is None:
        return []
    try:
        return await front.encode(
            request.prediction.text, add_special_tokens=False, max_len=front.max_prompt_len(params)
        )
    except ValueError as error:
        raise prompt_error(error, "prediction") from error


async def _encode(
    front: Front, request: ChatCompletionRequest, params: SamplingParams
) -> list[int]:
    if (handed := scope().handed) is not None:
        return handed.tokens
    try:
        size, max_len = sum(m.size for m in request.messages), front.max_prompt_len(params)
        return await off_loop(size, request.encode, front.tokenizer, max_len)
    except ValueError as error:
        raise prompt_error(error, "messages") from error


def _with_limit(
    front: Front, prompt_end: str, params: SamplingParams, budget: int | None
) -> SamplingParams:
    """The parameters with an end to thoughts, unless they have one of their own."""
    reasoning = front.reasoning
    if budget is None or reasoning is None or params.thinking_limit is not None:
        return params
    start = "" if reasoning.is_open(prompt_end) else reasoning.open
    marks = [front.tokenizer.encode(m, add_special_tokens=False) for m in (start, reasoning.close)]
    limit = ThinkingLimit(budget=budget, start=marks[0], end=marks[1])
    return params.model_copy(update={"thinking_limit": limit})


def _beginning(front: Front, prompt_end: str, forced_prefix: str | None) -> list[int]:
    """What an answer of a given form begins with: no thoughts, and the mark of a forced call."""
    skip = front.reasoning.skip(prompt_end) if front.reasoning is not None else ""
    if forced_prefix and front.reasoning is not None and front.reasoning.has_channels:
        skip = ""  # a call has a channel of its own
    return front.tokenizer.encode(skip + (forced_prefix or ""), add_special_tokens=False)


def _end_of(front: Front, request: ChatCompletionRequest, prompt: list[int]) -> str:
    """The prompt's end, which shows whether it has begun a block of thoughts.

    In a message that is to be continued, the block may have begun long before.
    """
    if front.reasoning is not None and request.continue_final_message:
        begun: str = request.messages[-1].for_template()["content"]
        _, mark, thought = begun.rpartition(front.reasoning.open.rstrip())
        if mark and front.reasoning.close not in thought:
            return mark
    return front.tokenizer.decode(prompt[-_END_TOKENS:], skip_special_tokens=False)


@dataclass(slots=True)
class AnswerDelta:
    """What a step brought a choice, read."""

    pieces: list[Piece]
    delta: TextDelta
    finish_reason: str | None


class Answers:
    """Iterates over what steps bring: (index of the choice, what it has got) of a chat's choices.

    Each goes on up to where its parser says that it is over.
    """

    def __init__(self, generation: Generation, parsers: Sequence[AnswerParser]) -> None:
        self._generation = generation
        self._parsers = parsers

    def __aiter__(self) -> "Answers":
        return self

    async def __anext__(self) -> list[tuple[int, AnswerDelta]]:
        return [
            (index, self._read(index, delta))
            for index, delta in await self._generation.__anext__()
            if not self._parsers[index].is_over
        ]

    def _read(self, index: int, delta: TextDelta) -> AnswerDelta:
        parser, reason = self._parsers[index], delta.finish_reason
        pieces = parser.pieces(delta.text, last=reason is not None)
        if parser.is_over:
            reason = "length" if reason == "length" and parser.is_cut else "stop"
            self._generation.complete(index)
        return AnswerDelta(pieces, delta, parser.finish_reason(reason))

    async def aclose(self) -> None:
        await self._generation.aclose()
