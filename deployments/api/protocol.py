"""Request bodies. What is not a field here is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from engine.sampling_params import SamplingParams
from engine.strict import StrictModel


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


class TextPart(StrictModel):
    type: Literal["text"]
    text: str


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it: text in one string, and no newer role names."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content}
        return message if self.name is None else message | {"name": self.name}


class ChatCompletionRequest(GenerationRequest):
    messages: list[Message] = Field(min_length=1)
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

    def template_options(self) -> dict[str, Any]:
        """Arguments of the chat template beside the messages."""
        return {
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
