"""Anthropic's Messages API: what a request may have, and the chat that it is."""

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from deployments.api.schema.protocol import (
    ChatCompletionRequest,
    ModelRequest,
    NotTooMany,
    SamplingFields,
    ServedRequest,
    TemplateVariables,
)
from deployments.api.schema.tools import ToolChoice, named_tool
from deployments.api.schema.turns import Turns
from engine.sampling_params import SamplingParams
from engine.text.messages import CalledFunction, Function, FunctionName, TextPart, Tool, ToolCall
from engine.text.request_model import NotServed, RequestModel, Unserved
from engine.text.tokenizer import Tokenizer

# Of a chat, for errors.
OTHER_NAMES = {
    "max_completion_tokens": "max_tokens",
    "response_format": "output_config.format",
    "stop": "stop_sequences",
    r"tools\.(\d+)\.function\.parameters": r"tools.\1.input_schema",
    r"tools\.(\d+)\.function": r"tools.\1",
}
# A client's first line of the system prompt, another one with every request: no prefix of a prompt
# that has it could be found again.
_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n*")
# Tools that Anthropic runs, or whose schemas only its models know.
_HOSTED = re.compile(r"[a-z0-9_]{1,48}_20\d{6}|mcp_toolset")

CacheControl = Annotated[
    dict[str, Any] | None, Field(description="A hint, which changes nothing: prefixes are found.")
]


class _Block(RequestModel):
    cache_control: CacheControl = None


class TextBlock(_Block):
    type: Literal["text"]
    text: str
    citations: Unserved = None

    def as_text(self) -> str:
        return self.text


class _TextSource(RequestModel):
    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: str


class DocumentBlock(_Block):
    type: Literal["document"]
    source: _TextSource
    title: str | None = None
    context: str | None = None
    citations: Annotated[None, NotServed({"enabled": False})] = None

    def as_text(self) -> str:
        return "\n".join(filter(None, (self.title, self.context, self.source.data)))


class SearchResultBlock(_Block):
    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock]
    citations: Annotated[None, NotServed({"enabled": False})] = None

    def as_text(self) -> str:
        return "\n".join([self.title, self.source, *(block.text for block in self.content)])


class ThinkingBlock(RequestModel):
    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class RedactedThinkingBlock(RequestModel):
    type: Literal["redacted_thinking"]
    data: str = Field(description="Of another server: nobody here can read it.")


class ToolUseBlock(_Block):
    type: Literal["tool_use"]
    id: str
    name: FunctionName
    input: dict[str, Any]
    caller: Annotated[None, NotServed({"type": "direct"})] = None
    toolset_name: Unserved = None


Shown = Annotated[TextBlock | DocumentBlock | SearchResultBlock, Field(discriminator="type")]


class ToolResultBlock(_Block):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Shown] = ""
    is_error: bool = False
    toolset_name: Unserved = None

    def as_text(self) -> str | list[TextPart]:
        text = _parts(self.content)
        if not self.is_error:
            return text
        return "Error: " + (text if isinstance(text, str) else "\n".join(p.text for p in text))


Block = Annotated[
    TextBlock
    | DocumentBlock
    | SearchResultBlock
    | ThinkingBlock
    | RedactedThinkingBlock
    | ToolUseBlock
    | ToolResultBlock,
    Field(discriminator="type"),
]


class MessageParam(RequestModel):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    def add_to(self, turns: Turns) -> None:
        if self.role == "assistant":
            _add_answer(turns, self.content)
            return
        said: list[TextPart] = []
        for block in [] if isinstance(self.content, str) else self.content:
            match block:
                case ToolResultBlock():
                    if said:
                        turns.add(self.role, said)
                        said = []
                    turns.add("tool", block.as_text(), tool_call_id=block.tool_use_id)
                case TextBlock() | DocumentBlock() | SearchResultBlock():
                    said.append(TextPart(type="text", text=block.as_text()))
                case _:
                    raise ValueError(f"messages: a {block.type} block is the assistant's alone")
        if isinstance(self.content, str) or said:
            turns.add(self.role, said or str(self.content))


def _add_answer(turns: Turns, content: str | list[Block]) -> None:
    if isinstance(content, str):
        turns.say(content)
        return
    said: list[TextPart] = []
    for block in content:
        if isinstance(block, TextBlock):
            said.append(TextPart(type="text", text=block.text))
            continue
        if said:
            turns.say(said)
            said = []
        match block:
            case ThinkingBlock():
                turns.think(block.thinking)
            case ToolUseBlock():
                function = CalledFunction(name=block.name, arguments=block.input)
                turns.call(ToolCall(id=block.id, function=function))
            case RedactedThinkingBlock():
                pass
            case _:
                raise ValueError(f"messages: a {block.type} block is the user's alone")
    if said:
        turns.say(said)


def _parts(content: str | list[Shown]) -> str | list[TextPart]:
    if isinstance(content, str):
        return content
    return [TextPart(type="text", text=block.as_text()) for block in content]


class CustomTool(_Block):
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] = "custom"
    strict: bool | None = None
    eager_input_streaming: bool | None = Field(None, description="Inputs come as they are made.")
    input_examples: Unserved = None
    defer_loading: Unserved = None
    allowed_callers: Annotated[None, NotServed(["direct"])] = None


def _kind_of_tool(tool: Any) -> str | None:
    kind = tool.get("type") if isinstance(tool, dict) else "custom"
    if kind in (None, "custom"):
        return "custom"
    return "hosted" if isinstance(kind, str) and _HOSTED.fullmatch(kind) else None


AnyTool = Annotated[
    Annotated[CustomTool, Tag("custom")] | Annotated[dict[str, Any], Tag("hosted")],
    Discriminator(
        _kind_of_tool,
        custom_error_type="tool_type",
        custom_error_message="type must be custom, or one of Anthropic's, as web_search_20250305",
    ),
]


class MessageToolChoice(RequestModel):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = Field(None, description="Of type tool.")
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _only_a_tool_has_a_name(self) -> "MessageToolChoice":
        if (self.type == "tool") != (self.name is not None):
            raise ValueError("a tool's name goes with type tool, and only with that")
        return self

    def as_chat(self) -> ToolChoice:
        if self.type == "tool":
            return named_tool(self.name or "")
        return "required" if self.type == "any" else self.type


class Thinking(RequestModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, lt=2**31)
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="omitted: thinking blocks are empty. Nothing is summarized."
    )


class OutputFormat(RequestModel):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(RequestModel):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(RequestModel):
    user_id: str | None = Field(None, description="The caller's own tag.")


class CountTokensRequest(ModelRequest):
    messages: Annotated[list[MessageParam], NotTooMany] = Field(min_length=1)
    system: str | list[TextBlock] = Field(default="", description="Before all messages.")
    tools: list[AnyTool] = Field(
        default_factory=list,
        max_length=128,
        description="Anthropic's own, as web_search_20250305, are left out: see x-tools-left-out.",
    )
    tool_choice: MessageToolChoice = MessageToolChoice(type="auto")
    thinking: Thinking | None = Field(None, description="Default: as the model's template has it.")
    output_config: OutputConfig = OutputConfig()
    cache_control: CacheControl = None
    context_management: dict[str, Any] | None = Field(
        None, description="Taken, without effect: the prompt is the messages as they are."
    )
    chat_template_kwargs: TemplateVariables = Field(default_factory=dict)
    speed: Annotated[None, NotServed("standard")] = None
    mcp_servers: Unserved = None
    user_profile_id: Unserved = None
    workspace_id: Unserved = None

    def to_chat(self) -> ChatCompletionRequest:
        """The same as a chat. Raises ValueError for what can be none."""
        turns = Turns()
        if system := self._system():
            turns.add("system", system)
        for message in self.messages:
            message.add_to(turns)
        continues = self.messages[-1].role == "assistant"
        form = self.output_config.format
        schema = form and {"name": "output", "schema": form.schema_}
        return ChatCompletionRequest(
            messages=turns.messages,
            tools=self._tools(),
            tool_choice=self.tool_choice.as_chat(),
            parallel_tool_calls=not self.tool_choice.disable_parallel_tool_use,
            response_format={"type": "json_schema", "json_schema": schema} if schema else None,
            chat_template_kwargs=self._variables() | self.chat_template_kwargs,
            thinking_token_budget=self.thinking.budget_tokens if self.thinking else None,
            reasoning_effort=self.output_config.effort,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            **self._generation(),
        )

    def _system(self) -> list[TextPart]:
        blocks = self.system
        texts = [blocks] if isinstance(blocks, str) else [block.text for block in blocks]
        texts = [_BILLING.sub("", text, 1) if _BILLING.match(text) else text for text in texts]
        return [TextPart(type="text", text=text) for text in texts if text]

    def _tools(self) -> list[Tool]:
        """In an order of their own: clients that gather them anew each time change theirs."""
        own = [tool for tool in self.tools if isinstance(tool, CustomTool)]
        functions = [
            Function(
                name=tool.name,
                description=tool.description,
                parameters=tool.input_schema,
                strict=tool.strict,
            )
            for tool in sorted(own, key=lambda tool: tool.name)
        ]
        return [Tool(function=function) for function in functions]

    @property
    def left_out(self) -> list[str]:
        """Types of tools that the model is not told of."""
        return [str(tool["type"]) for tool in self.tools if isinstance(tool, dict)]

    def _variables(self) -> dict[str, Any]:
        if self.thinking is None or self.thinking.type == "adaptive":
            return {}
        thinks = self.thinking.type == "enabled"
        return {"enable_thinking": thinks, "thinking": thinks}

    def _generation(self) -> dict[str, Any]:
        """What the chat has beside its prompt."""
        return {}


class MessagesRequest(SamplingFields, ServedRequest, CountTokensRequest):
    max_tokens: int = Field(ge=1, lt=2**31)
    stop_sequences: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, max_length=64
    )
    metadata: Metadata = Metadata()
    service_tier: Annotated[None, NotServed("auto", "standard_only")] = None
    container: Unserved = None
    diagnostics: Unserved = None
    inference_geo: Unserved = None

    def encode(self, tokenizer: Tokenizer, max_len: int | None = None) -> list[int]:
        return self.to_chat().encode(tokenizer, max_len)

    def _generation(self) -> dict[str, Any]:
        same = set(SamplingParams.model_fields) | set(ServedRequest.model_fields)
        given = same & self.model_fields_set - {"max_tokens"}
        return {name: getattr(self, name) for name in given} | {
            "max_completion_tokens": self.max_tokens,
            "stop": self.stop_sequences,
        }
