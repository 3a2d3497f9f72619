"""The Responses API: what a request may have, and the chat that it is."""

import secrets
import time
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from deployments.api.schema.protocol import (
    AgentRequest,
    ChatCompletionRequest,
    Effort,
    NotTooMany,
    SamplingFields,
    TemplateVariables,
    Verbosity,
)
from deployments.api.schema.responses.items import InputItem, to_messages
from deployments.api.schema.responses.tools import AnyTool, Toolbox, full_name
from deployments.api.schema.structured import JsonObjectFormat, NamedSchema, TextFormat
from deployments.api.schema.tools import AllowedTools, ToolChoice, named_tool
from engine.sampling_params import SamplingParams
from engine.text.messages import FunctionName, Message
from engine.text.request_model import NotServed, RequestModel, Unserved
from engine.text.tokenizer import Tokenizer

# Of a chat, for errors.
OTHER_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    r"tools\.(\d+)\.function": r"tools.\1",
}
# What may be asked for beside the answer; all but the first are of tools that never run here.
ENCRYPTED = "reasoning.encrypted_content"
Includable = Literal[
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ToolReference(RequestModel):
    type: Literal["function", "custom"]
    name: FunctionName
    namespace: FunctionName | None = None

    @property
    def full_name(self) -> str:
        return full_name(self.name, self.namespace)


class AllowedChoice(RequestModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ToolReference] = Field(min_length=1)


class SchemaFormat(NamedSchema):
    """Flat, as the API's tools are."""

    type: Literal["json_schema"]


class TextOptions(RequestModel):
    format: Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] = (
        TextFormat(type="text")
    )
    verbosity: Verbosity = None

    def response_format(self) -> dict[str, Any]:
        """The format as a chat has it."""
        format = self.format.model_dump(by_alias=True)
        if not isinstance(self.format, SchemaFormat):
            return format
        kind = format.pop("type")
        return {"type": kind, kind: format}


class ReasoningOptions(RequestModel):
    effort: Effort = None
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="Taken, without effect: thoughts come as they are."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="An older name of summary."
    )
    context: Annotated[None, NotServed("auto")] = None
    mode: Annotated[None, NotServed("standard")] = None


class ResponseRequest(SamplingFields, AgentRequest):
    input: Annotated[str | Annotated[list[InputItem], Field(min_length=1)], NotTooMany]
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(
        None, ge=1, lt=2**31, description="Default: to the window's end."
    )
    tools: list[AnyTool] = Field(
        default_factory=list,
        max_length=128,
        description="OpenAI's own, as web_search, are left out: see x-tools-left-out.",
    )
    tool_choice: Literal["none", "auto", "required"] | AllowedChoice | ToolReference = "auto"
    parallel_tool_calls: bool = True
    text: TextOptions = TextOptions()
    reasoning: ReasoningOptions = ReasoningOptions()
    include: list[Includable] = Field(default_factory=list)
    previous_response_id: str | None = Field(
        None, max_length=128, description="Goes on from a response that is still stored."
    )
    truncation: Literal["auto", "disabled"] = Field(
        "disabled", description="auto: of a prompt that is too long, its end is kept."
    )
    max_tool_calls: int | None = Field(None, ge=1, description="Of hosted tools: there are none.")
    client_metadata: dict[str, Any] | None = Field(None, description="More tags.", max_length=64)
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)
    access_programs: Unserved = None
    background: Unserved = None
    background_options: Annotated[None, NotServed({}, {"completion_window": "soonest"})] = None
    context_management: Unserved = None
    conversation: Unserved = None
    image: Annotated[None, NotServed({}, {"context_compression": "auto"})] = None
    prompt: Unserved = None
    stream_options: Annotated[None, NotServed({}, {"include_obfuscation": False})] = None
    top_logprobs: Unserved = None

    @cached_property
    def toolbox(self) -> Toolbox:
        return Toolbox(self.tools)

    @property
    def messages(self) -> list[Message]:
        """The input as messages of a chat."""
        if isinstance(self.input, str):
            return [Message(role="user", content=self.input)]
        return to_messages(self.input)

    def to_chat(self, history: Sequence[Message] = ()) -> ChatCompletionRequest:
        """The same request as a chat's.

        Args:
            history: what came before the input.
        """
        system = [Message(role="system", content=self.instructions)] if self.instructions else []
        same = (set(SamplingParams.model_fields) | set(AgentRequest.model_fields)) & set(
            self.model_fields_set
        )
        cut = {"truncate_prompt_tokens": -1} if self.truncation == "auto" else {}
        return ChatCompletionRequest(
            messages=[*system, *history, *self.messages],
            tools=self.toolbox.functions,
            tool_choice=self._choice(),
            parallel_tool_calls=self.parallel_tool_calls,
            max_completion_tokens=self.max_output_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
            reasoning_effort=self.reasoning.effort,
            verbosity=self.text.verbosity,
            response_format=self.text.response_format(),
            **{name: getattr(self, name) for name in same},
            **cut,
        )

    def encode(self, tokenizer: Tokenizer, max_len: int | None = None) -> list[int]:
        if self.previous_response_id is not None:
            raise ValueError("previous_response_id: what came before the input is not known here")
        return self.to_chat().encode(tokenizer, max_len)

    def _choice(self) -> ToolChoice:
        choice = self.tool_choice
        if isinstance(choice, ToolReference):
            return named_tool(choice.full_name)
        if isinstance(choice, AllowedChoice):
            return AllowedTools.of(choice.mode, [tool.full_name for tool in choice.tools])
        return choice

    @property
    def is_stored(self) -> bool:
        return self.store is not False

    def head(self, model_name: str, params: SamplingParams) -> dict[str, Any]:
        """What the response says of the request."""
        choice = self.tool_choice
        return {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model_name,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata,
            "parallel_tool_calls": self.parallel_tool_calls,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": self.reasoning.effort, "summary": None},
            "safety_identifier": self.safety_identifier,
            "service_tier": "default",
            "store": self.is_stored,
            "temperature": params.temperature,
            "text": self.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool if isinstance(tool, dict) else tool.shown() for tool in self.tools],
            "top_p": params.top_p,
            "truncation": self.truncation,
            "user": self.user,
        }
