"""The body of /v1/completions."""

from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from deployments.api.schema.protocol import GenerationRequest
from engine.sampling_params import TokenId
from engine.text.request_model import Unserved
from engine.text.tokenizer import Tokenizer

TokenIds = Annotated[list[TokenId], Field(min_length=1)]


def _kind_of_prompt(value: Any) -> str | None:
    """Told by the first item, so that a long list is looked at once, as the kind that it is."""
    if isinstance(value, str):
        return "text"
    if not isinstance(value, list) or not value:
        return None
    if isinstance(value[0], str):
        return "texts"
    return "lists of token ids" if isinstance(value[0], list) else "token ids"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], Tag("texts")]
    | Annotated[TokenIds, Tag("token ids")]
    | Annotated[list[TokenIds], Tag("lists of token ids")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt",
        custom_error_message="Input should be a text, a list of token ids, or a list of either",
    ),
]


def listed(prompt: Any) -> list[Any]:
    """One or many texts or lists of token ids as a list of them."""
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    return [prompt] if is_one else list(prompt)


class CompletionRequest(GenerationRequest):
    prompt: Prompt
    max_tokens: int | None = Field(
        16, ge=0, lt=2**31, description="0, with echo, is for scoring a prompt."
    )
    echo: bool = Field(False, description="Begin the text, and logprobs, with the prompt.")
    best_of: int | None = Field(
        None,
        ge=1,
        le=128,
        description="Make so many choices, return the n most probable per token.",
    )
    suffix: Unserved = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _false_is_no_number(cls, value: Any) -> Any:
        return None if value is False else value

    @model_validator(mode="after")
    def _echo_and_best_of(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 leaves nothing to answer; it needs echo")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of: {self.best_of}, but it must be at least n ({self.n})")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            raise ValueError("best_of: a stream cannot wait for the best; leave stream out")
        if self.echo and self.logprobs is not None and self.stream and self.n > 1:
            raise ValueError("n: 1 where a stream echoes the prompt with logprobs")
        return self

    @property
    def num_choices(self) -> int:
        """Choices to make for each prompt, of which n are returned."""
        return self.best_of or self.n

    def translated(self) -> dict[str, Any]:
        values: dict[str, Any] = {"n": self.num_choices}
        if self.max_tokens == 0:
            values["max_tokens"] = 1  # an engine always samples; the token is not shown
        if self.num_choices > self.n and self.logprobs is None:
            values["logprobs"] = 0
        if self.echo and self.logprobs is not None:
            values["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return values

    def encode(self, tokenizer: Tokenizer, max_len: int | None = None) -> list[int]:
        first = self.prompts[0]
        return tokenizer.encode(first, max_len=max_len) if isinstance(first, str) else first

    @property
    def prompts(self) -> list[str | list[int]]:
        return listed(self.prompt)
