"""Request bodies. What is not a field here is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from deployments.api.messages import Message
from deployments.api.tools import NamedTool, Tool, ToolChoice
from engine.sampling_params import SamplingParams
from engine.strict import StrictModel

# What the template's renderer and its callers take themselves.
_NOT_VARIABLES = frozenset(
    (
        *("self", "messages", "conversations", "tools", "documents", "chat_template"),
        *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask"),
    )
)


class StreamOptions(StrictModel):
    include_usage: bool = Field(False, description="End the stream with a chunk of token counts.")


class GenerationRequest(SamplingParams):
    """What chat and text completions have in common: all sampling parameters, and these."""

    model: str | None = Field(None, description="Default: the model being served.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = Field(1, description="Only one choice per prompt is supported.")
    user: str | None = Field(None, description="The caller's own tag; changes nothing.")
    cache_salt: str = Field(
        "", max_length=256, description="Only requests of equal salt share cached prefixes."
    )

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None or name not in cls.model_fields
        }

    @model_validator(mode="after")
    def _options_need_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """What the request sets, over the model's recommended values."""
        given = self.model_fields_set & set(SamplingParams.model_fields)
        return SamplingParams(**(defaults | {name: getattr(self, name) for name in given}))


class ChatCompletionRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
    tools: list[Tool] = Field(default_factory=list, max_length=128)
    tool_choice: ToolChoice | None = Field(
        None,
        description="none: no call; auto (default with tools): the model decides; required: a call "
        "of any tool; or one by name. The last two are enforced by a grammar.",
    )
    parallel_tool_calls: bool = Field(True, description="False allows one call at most.")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="OpenAI's newer name of max_tokens; default: to the window's end."
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="Variables for the chat template, as enable_thinking."
    )
    add_generation_prompt: bool = True
    continue_final_message: bool = Field(
        False, description="Continue the last message; add_generation_prompt must be false."
    )

    @model_validator(mode="after")
    def _one_way_to_go_on(self) -> "ChatCompletionRequest":
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError(
                "continue_final_message: set add_generation_prompt to false to continue a message"
            )
        return self

    @model_validator(mode="after")
    def _choice_among_tools(self) -> "ChatCompletionRequest":
        if self.tool_choice in ("auto", "required") or isinstance(self.tool_choice, NamedTool):
            names = [tool.function.name for tool in self.tools]
            if not names:
                raise ValueError("tool_choice: there are no tools to choose from")
            if isinstance(self.tool_choice, NamedTool):
                wanted = self.tool_choice.function.name
                if wanted not in names:
                    raise ValueError(f"tool_choice: {wanted!r} is not among the tools ({names})")
        return self

    @field_validator("chat_template_kwargs")
    @classmethod
    def _only_variables(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in _NOT_VARIABLES or not name.isidentifier():
                raise ValueError(f"{name!r} is not a variable of the template that can be set here")
        return value

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        return [] if self.tool_choice == "none" else self.tools

    def template_options(self) -> dict[str, Any]:
        """Arguments of the chat template beside the messages."""
        return {
            "tools": [tool.for_template() for tool in self.offered_tools],
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            **self.chat_template_kwargs,
        }

    def sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        longest = self.max_completion_tokens
        if longest is None:
            longest = self.max_tokens if "max_tokens" in self.model_fields_set else None
        return super().sampling_params(defaults).model_copy(update={"max_tokens": longest})


TokenIds = Annotated[list[int], Field(min_length=1)]


class CompletionRequest(GenerationRequest):
    prompt: str | TokenIds | Annotated[list[str] | list[TokenIds], Field(min_length=1)]

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or many prompts as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)
