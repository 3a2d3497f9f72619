"""Request bodies. What is not a field here is refused by name."""

from typing import Annotated, Any, Literal

import msgpack
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StringConstraints,
    model_validator,
)

from deployments.api.requests.resume import WhereToGoOn
from deployments.api.schema.structured import FormFields
from deployments.api.schema.tools import AllowedTools, ToolChoice, names_of
from deployments.api.scope import scope
from engine.sampling_params import MAX_LOGPROBS, SamplingParams
from engine.text.chat_template import check_variables
from engine.text.messages import Message, TextPart, Tool
from engine.text.request_model import NotServed, RequestModel, Unserved
from engine.text.tokenizer import Tokenizer

TemplateVariables = Annotated[dict[str, Any], AfterValidator(check_variables)]


def _not_too_many(messages: Any) -> Any:
    """Counted before any is looked at."""
    limit = scope().service.max_messages
    if isinstance(messages, list) and len(messages) > limit:
        raise ValueError(f"{len(messages)} are too many, the limit is {limit}")
    return messages


# In front of a list of messages.
NotTooMany = BeforeValidator(_not_too_many)


class ModelRequest(RequestModel):
    """What all requests have in common."""

    model: str | None = Field(None, description="Default: the model being served.")

    @model_validator(mode="before")
    @classmethod
    def _can_be_sent_on(cls, data: Any) -> Any:
        """JSON can hold what no tokenizer, template or socket takes."""
        try:
            msgpack.packb(data, default=lambda _: None)
        except UnicodeEncodeError:
            raise ValueError("a text has half of a surrogate pair, which is no character") from None
        except ValueError:
            raise ValueError("the request is nested too deeply") from None
        return data


class ServedRequest(ModelRequest):
    """What requests that make the model generate have in common."""

    stream: bool = False
    user: str | None = Field(None, description="The caller's own tag; changes nothing.")
    cache_salt: str = Field(
        "", max_length=256, description="Only requests of equal salt share cached prefixes."
    )
    priority: int = Field(
        0,
        ge=-(2**31),
        lt=2**31,
        description="Smaller is sooner; only with scheduling_policy=priority.",
    )
    timeout: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="Seconds after which the request is ended with an error; the server's own "
        "limit still holds.",
    )

    def encode(self, tokenizer: Tokenizer, max_len: int | None = None) -> list[int]:
        """The (first) prompt's tokens; raises ValueError where there are none, or too many."""
        raise NotImplementedError


Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=16),
]


class AgentRequest(ServedRequest):
    """What chats and responses have in common."""

    metadata: Metadata = Field(default_factory=dict, description="More tags of the caller's own.")
    safety_identifier: str | None = Field(None, description="Another tag, which changes nothing.")
    prompt_cache_key: str | None = Field(
        None, description="The same: prefixes are found without it. To divide them: cache_salt."
    )
    prompt_cache_options: Annotated[None, NotServed({}, {"mode": "implicit"})] = None
    prompt_cache_retention: Literal["in_memory", "24h"] | None = Field(
        None, description="Taken, without effect: prefixes stay while there is room."
    )
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = Field(
        None, description="Taken, without effect: all are served alike. See priority."
    )
    store: bool | None = Field(
        None, description="Of a response: whether others may go on from it. Chats are never kept."
    )
    moderation: Unserved = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None
Verbosity = Annotated[
    Literal["low", "medium", "high"] | None,
    Field(description="Given to the template, which may know it."),
]
# Tokens of thoughts, where the template knows only whether to think.
_BUDGETS = {"minimal": 512, "low": 2048, "medium": 8192}
# What templates know of reasoning_effort.
_TEMPLATE_EFFORTS = {"minimal": "low", "xhigh": "high", "max": "high"}


def effort_variables(effort: Effort) -> dict[str, Any]:
    """The template's variables, which have several names."""
    if effort is None:
        return {}
    thinks = effort != "none"
    told = {"reasoning_effort": _TEMPLATE_EFFORTS.get(effort, effort)} if thinks else {}
    return {"enable_thinking": thinks, "thinking": thinks, **told}


class StreamOptions(RequestModel):
    include_usage: bool = Field(False, description="End the stream with a chunk of token counts.")
    continuous_usage_stats: bool = Field(
        False, description="Every chunk has its choice's token counts so far, as in vLLM."
    )
    include_obfuscation: Unserved = None


class Prediction(RequestModel):
    """Text that much of the answer is thought to repeat, such as a file that is to be changed."""

    type: Literal["content"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


def _sampling(name: str) -> Any:
    """A field of `SamplingParams`, for a model that has only some of them."""
    return SamplingParams.model_fields[name]


class SamplingFields(RequestModel):
    """The sampling parameters of APIs that have their own names for the others."""

    temperature: float = _sampling("temperature")
    top_p: float = _sampling("top_p")
    top_k: int = _sampling("top_k")
    min_p: float = _sampling("min_p")
    presence_penalty: float = _sampling("presence_penalty")
    frequency_penalty: float = _sampling("frequency_penalty")
    repetition_penalty: float = _sampling("repetition_penalty")
    seed: int | None = _sampling("seed")


class GenerationRequest(SamplingParams, FormFields, ServedRequest):
    """What chat and text completions have in common: all sampling parameters, and these."""

    stream_options: StreamOptions | None = None
    pooling: Unserved = Field(None, description="See /v1/embeddings.")
    return_token_ids: bool = Field(
        False, description="Choices have token_ids, and their prompt prompt_token_ids; as in vLLM."
    )
    return_tokens_as_token_ids: bool = Field(
        False, description="Tokens in logprobs are written as token_id:ID; as in vLLM."
    )

    return_metrics: bool = Field(
        False,
        description="The answer, or a last chunk, has metrics: how long it waited, its speed, what "
        "was cached and guessed; of one output, null with several.",
    )
    resume: WhereToGoOn = None

    @model_validator(mode="after")
    def _options_need_stream(self) -> "GenerationRequest":
        if self.stream_options not in (None, StreamOptions()) and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        if self.prompt_logprobs is not None and self.stream:
            raise ValueError("prompt_logprobs: not in a stream; leave stream out")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        """What the request sets, over the model's recommended values."""
        given = self.model_fields_set & set(SamplingParams.model_fields)
        values = {name: getattr(self, name) for name in given}
        form = self.form()
        if form is not None:
            values["structured_outputs"] = form
        return SamplingParams(**defaults | values | self.translated())

    def translated(self) -> dict[str, Any]:
        """Sampling parameters that this endpoint spells otherwise."""
        return {}

    def other_names(self) -> dict[str, str]:
        """What this request calls sampling parameters that have other names."""
        given = self._given()
        return {"structured_outputs": given[0]} if given else {}


class ChatCompletionRequest(GenerationRequest, AgentRequest):
    messages: Annotated[list[Message], NotTooMany] = Field(min_length=1)
    tools: list[Tool] = Field(default_factory=list, max_length=128)
    tool_choice: ToolChoice | None = Field(
        None,
        description="none: no call; auto (default with tools): the model decides; required: a call "
        "of any tool; or one by name. The last two are enforced by a grammar.",
    )
    parallel_tool_calls: bool = Field(True, description="False allows one call at most.")
    max_tokens: int | None = Field(
        None, ge=1, lt=2**31, description="Default: to the window's end."
    )
    max_completion_tokens: int | None = Field(
        None,
        ge=1,
        lt=2**31,
        description="OpenAI's newer name of max_tokens, before which it goes.",
    )
    logprobs: bool = Field(False, description="Log-probabilities of the answer's tokens.")
    top_logprobs: int = Field(
        0, ge=0, le=MAX_LOGPROBS, description="And of so many most probable ones; needs logprobs."
    )
    chat_template_kwargs: TemplateVariables = Field(
        default_factory=dict, description="Variables for the chat template, as enable_thinking."
    )
    add_generation_prompt: bool = True
    continue_final_message: bool = Field(
        False, description="Continue the last message; add_generation_prompt must be false."
    )
    audio: Unserved = None
    function_call: Annotated[None, NotServed("none", "auto")] = None
    functions: Unserved = None
    modalities: Annotated[None, NotServed(["text"])] = None
    prediction: Prediction | None = Field(
        None, description="How the answer may go: it comes sooner where it does."
    )
    thinking_token_budget: int | None = Field(
        None, ge=0, lt=2**31, description="Tokens after which thoughts are made to end."
    )
    reasoning_effort: Effort = Field(
        None, description="none: no thoughts. Templates that know of more are told which."
    )
    include_reasoning: bool = Field(
        True, description="False: thoughts are counted, and left out of the answer; as in vLLM."
    )
    verbosity: Verbosity = None
    web_search_options: Unserved = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        return self

    @model_validator(mode="after")
    def _choice_among_tools(self) -> "ChatCompletionRequest":
        if self.tool_choice in (None, "none", "auto"):
            return self
        names = [tool.function.name for tool in self.tools]
        if not names:
            raise ValueError("tool_choice: there are no tools to choose from")
        for wanted in names_of(self.tool_choice):
            if wanted not in names:
                raise ValueError(f"tool_choice: {wanted!r} is not among the tools ({names})")
        return self

    @property
    def thinking_budget(self) -> int | None:
        """Its own, or that of its effort."""
        if self.thinking_token_budget is not None:
            return self.thinking_token_budget
        return _BUDGETS.get(self.reasoning_effort or "")

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model is told of."""
        if isinstance(self.tool_choice, AllowedTools):
            allowed = names_of(self.tool_choice)
            return [tool for tool in self.tools if tool.function.name in allowed]
        return [] if self.tool_choice == "none" else self.tools

    def template_options(self) -> dict[str, Any]:
        """Arguments of the chat template beside the messages."""
        return {
            "tools": [tool.for_template() for tool in self.offered_tools],
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            **({"verbosity": self.verbosity} if self.verbosity else {}),
            **effort_variables(self.reasoning_effort),
            **self.chat_template_kwargs,
        }

    def encode(self, tokenizer: Tokenizer, max_len: int | None = None) -> list[int]:
        messages = [message.for_template() for message in self.messages]
        return tokenizer.encode_chat(messages, max_len=max_len, **self.template_options())

    def sampling_params(self, defaults: dict[str, Any]) -> SamplingParams:
        return super().sampling_params({"max_tokens": None} | defaults)

    def translated(self) -> dict[str, Any]:
        values: dict[str, Any] = {"logprobs": self.top_logprobs if self.logprobs else None}
        if self.max_completion_tokens is not None:
            values["max_tokens"] = self.max_completion_tokens
        return values

    def other_names(self) -> dict[str, str]:
        names = {"max_tokens": "max_completion_tokens"} if self.max_completion_tokens else {}
        return super().other_names() | names
