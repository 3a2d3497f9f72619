"""POST /v1/responses: the Responses API, without state: nothing is stored between requests."""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field, ValidationError

from deployments.api.bodies import BodyRoute
from deployments.api.errors import report, validation_error
from deployments.api.routes.chat import Chat, read
from deployments.api.schema import answers
from deployments.api.schema.answers import documented
from deployments.api.schema.protocol import (
    AgentRequest,
    ChatCompletionRequest,
    NotTooMany,
    TemplateVariables,
)
from deployments.api.schema.response_items import InputItem, to_messages
from deployments.api.schema.response_output import ResponseOutput
from deployments.api.schema.structured import JsonObjectFormat, NamedSchema, TextFormat
from deployments.api.schema.tools import NamedTool
from deployments.api.scope import scope
from deployments.api.streaming import await_first, event_stream, named_event
from deployments.front.front import Front, TextDelta
from engine.sampling_params import SamplingParams
from engine.strict import explain
from engine.text.messages import Function, FunctionName, Message, Tool
from engine.text.request_model import NotServed, RequestModel, Unserved
from engine.text.tokenizer import Tokenizer

# Of a chat, for errors.
_OTHER_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    r"tools\.(\d+)\.function": r"tools.\1",
}


class FunctionTool(Function):
    """The API's functions are flat."""

    type: Literal["function"]
    allowed_callers: Annotated[None, NotServed(["direct"])] = None
    defer_loading: Unserved = None
    output_schema: Unserved = None
    is_async: Unserved = Field(None, alias="async")


class FunctionChoice(RequestModel):
    type: Literal["function"]
    name: FunctionName


class SchemaFormat(NamedSchema):
    """Flat, too."""

    type: Literal["json_schema"]


class TextOptions(RequestModel):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] = (
        TextFormat(type="text")
    )
    verbosity: Annotated[None, NotServed("medium")] = None

    def response_format(self) -> dict[str, Any]:
        """The format as a chat has it."""
        format = self.format.model_dump(by_alias=True)
        if not isinstance(self.format, SchemaFormat):
            return format
        kind = format.pop("type")
        return {"type": kind, kind: format}


def _sampling(name: str) -> Any:
    """The sampling parameter of that name, as everywhere."""
    return SamplingParams.model_fields[name]


class ResponseRequest(AgentRequest):
    input: Annotated[str | Annotated[list[InputItem], Field(min_length=1)], NotTooMany]
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(
        None, ge=1, lt=2**31, description="Default: to the window's end."
    )
    temperature: float = _sampling("temperature")
    top_p: float = _sampling("top_p")
    top_k: int = _sampling("top_k")
    min_p: float = _sampling("min_p")
    presence_penalty: float = _sampling("presence_penalty")
    frequency_penalty: float = _sampling("frequency_penalty")
    repetition_penalty: float = _sampling("repetition_penalty")
    seed: int | None = _sampling("seed")
    tools: list[FunctionTool] = Field(default_factory=list, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    max_tool_calls: int | None = Field(None, ge=1, description="Of hosted tools: there are none.")
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)
    access_programs: Unserved = None
    background: Unserved = None
    background_options: Annotated[None, NotServed({}, {"completion_window": "soonest"})] = None
    context_management: Unserved = None
    conversation: Unserved = None
    image: Annotated[None, NotServed({}, {"context_compression": "auto"})] = None
    include: Unserved = None
    previous_response_id: Unserved = None
    prompt: Unserved = None
    reasoning: Annotated[None, NotServed({})] = None
    stream_options: Annotated[None, NotServed({}, {"include_obfuscation": False})] = None
    top_logprobs: Unserved = None
    truncation: Annotated[None, NotServed("disabled")] = None

    def to_chat(self) -> ChatCompletionRequest:
        """The same as a chat."""
        system = [Message(role="system", content=self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            messages = [Message(role="user", content=self.input)]
        else:
            messages = to_messages(self.input)
        same = (set(SamplingParams.model_fields) | set(AgentRequest.model_fields)) & set(
            self.model_fields_set
        )
        choice: Any = self.tool_choice
        if isinstance(choice, FunctionChoice):
            choice = NamedTool.model_validate({"function": {"name": choice.name}})
        return ChatCompletionRequest(
            messages=system + messages,
            tools=[Tool(function=_plain(tool)) for tool in self.tools],
            tool_choice=choice,
            parallel_tool_calls=self.parallel_tool_calls,
            max_completion_tokens=self.max_output_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
            response_format=self.text.response_format(),
            **{name: getattr(self, name) for name in same},
        )

    def encode(self, tokenizer: Tokenizer, max_len: int | None = None) -> list[int]:
        return self.to_chat().encode(tokenizer, max_len)

    def head(self, front: Front, params: SamplingParams) -> dict[str, Any]:
        """What the response says of the request."""
        choice = self.tool_choice
        return {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": front.model_name,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata,
            "parallel_tool_calls": self.parallel_tool_calls,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": self.text.model_dump(by_alias=True),
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [{"type": "function", **_plain(tool).model_dump()} for tool in self.tools],
            "top_p": params.top_p,
            "truncation": "disabled",
            "user": self.user,
        }


def _plain(tool: FunctionTool) -> Function:
    return Function(**{name: getattr(tool, name) for name in Function.model_fields})


def routes(front: Front) -> APIRouter:
    router = APIRouter(route_class=BodyRoute)

    @router.post(
        "/v1/responses",
        response_model=None,
        responses=documented(answers.Response, streams=True),
    )
    async def create_response(request: ResponseRequest) -> Response:
        scope().names = dict(_OTHER_NAMES)
        try:
            as_chat = request.to_chat()
        except ValidationError as error:
            raise validation_error(explain(error.errors())) from error
        chat = await Chat.start(front, as_chat)
        output = ResponseOutput(request.head(front, chat.params))
        events = _events(chat, output)
        if request.stream:
            if chat.has_grammar:
                events = await await_first(events)
            return event_stream(events, lambda error: _failed(output, error))
        async with aclosing(events):
            async for _ in events:
                pass
        return JSONResponse(output.response())

    return router


async def _events(chat: Chat, output: ResponseOutput) -> AsyncGenerator[str]:
    opening = list(map(named_event, output.begin()))
    (stream,) = chat.streams()
    reason: str | None = None
    delta: TextDelta | None = None
    async with aclosing(read(stream, chat.new_parser())) as steps:
        async for step in steps:
            delta, reason = step.delta, step.finish_reason
            news = [named_event(e) for piece in step.pieces for e in output.add(piece)]
            if opening or news:
                yield "".join(opening + news)
                opening = []
    assert delta is not None, "a stream has at least one delta"
    yield "".join(map(named_event, output.end(reason, await _usage(chat, output, delta))))


def _failed(output: ResponseOutput, error: Exception | None) -> str:
    return "" if error is None else named_event(output.fail(report(error)))


async def _usage(chat: Chat, output: ResponseOutput, last: TextDelta) -> dict[str, Any]:
    thoughts = await chat.front.encode(output.reasoning, add_special_tokens=False)
    cached = last.num_cached_tokens
    details = {"cached_tokens": cached, "cache_write_tokens": len(chat.prompt) - cached}
    return {
        "input_tokens": len(chat.prompt),
        "input_tokens_details": details,
        "output_tokens": last.num_tokens,
        "output_tokens_details": {"reasoning_tokens": len(thoughts)},
        "total_tokens": len(chat.prompt) + last.num_tokens,
    }
