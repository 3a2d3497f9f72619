"""What answers look like, for the OpenAPI document; `message_answers.py` has the Messages API's.

Answers are written as plain dicts, which is fast; tests hold them to these models.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer):
    error: ErrorDetail


def documented(
    answer: type[BaseModel], streams: bool = False, error: type[Answer] = Error
) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: its answer, and errors, which all have one shape."""
    success: dict[str, Any] = {"model": answer}
    if streams:
        success["content"] = {"text/event-stream": {}}
        success["description"] = "The answer; server-sent events where the request has stream."
    return {
        200: success,
        "4XX": {"model": error, "description": "The request cannot be served as it is."},
        "5XX": {"model": error, "description": "The server cannot serve it now."},
    }


class Health(Answer):
    status: Literal["ok"]


class Load(Answer):
    server_load: int


class TokenizerInfo(BaseModel):
    model_config = ConfigDict(extra="allow")

    tokenizer_class: str
    chat_template: str | None


class Obeyed(Answer):
    status: Literal["started", "written", "asleep", "awake", "updated"]


class Version(Answer):
    version: str


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class CachedTokens(Answer):
    cached_tokens: int


class ReasoningTokens(Answer):
    reasoning_tokens: int


class CompletionTokens(ReasoningTokens):
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatUsage(Usage):
    completion_tokens_details: CompletionTokens


class SpeculativeDecoding(Answer):
    num_draft_tokens: int
    num_accepted_draft_tokens: int


class RequestMetrics(Answer):
    time_to_first_token_ms: float
    generation_time_ms: float
    queue_time_ms: float
    mean_itl_ms: float | None
    tokens_per_second: float | None
    cached_tokens: int
    num_preemptions: int
    speculative_decoding: SpeculativeDecoding | None


class PromptLogprob(Answer):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class TokenLogprob(Answer):
    token: str
    logprob: float
    bytes: list[int]


class TopLogprobs(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Answer):
    content: list[TopLogprobs]
    refusal: None


class Function(Answer):
    name: str
    arguments: str


class ToolCall(Answer):
    id: str
    type: Literal["function"]
    function: Function


class AssistantMessage(Answer):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCall] = Field(default_factory=list)


class ChatChoice(Answer):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None
    token_ids: list[int] | None = None


class ChatCompletion(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: ChatUsage
    metrics: RequestMetrics | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class TextLogprobs(Answer):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TextChoice(Answer):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: int | str | None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class TextCompletion(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage
    metrics: RequestMetrics | None = None


class Tokens(Answer):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None


class Text(Answer):
    prompt: str


class PooledUsage(Answer):
    prompt_tokens: int
    total_tokens: int


class Embedding(Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(Answer):
    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: PooledUsage


class Classification(Answer):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classifications(Answer):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classification]
    usage: PooledUsage


class Score(Answer):
    object: Literal["score"]
    index: int
    score: float


class ScoreList(Answer):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: PooledUsage


class Document(Answer):
    text: str


class Ranked(Answer):
    index: int
    relevance_score: float
    document: Document | None = None


class Ranking(Answer):
    id: str
    model: str
    results: list[Ranked]
    usage: PooledUsage


class OutputText(Answer):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]


class ReasoningText(Answer):
    type: Literal["reasoning_text"]
    text: str


ItemStatus = Literal["in_progress", "completed", "incomplete"]


class MessageItem(Answer):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputText]


class ReasoningItem(Answer):
    id: str
    type: Literal["reasoning"]
    status: ItemStatus
    summary: list[Any]
    content: list[ReasoningText]
    encrypted_content: str | None = None


class FunctionCallItem(Answer):
    id: str
    type: Literal["function_call"]
    status: ItemStatus
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class CustomToolCallItem(Answer):
    id: str
    type: Literal["custom_tool_call"]
    status: ItemStatus
    call_id: str
    name: str
    input: str
    namespace: str | None = None


class Deleted(Answer):
    id: str
    object: str
    deleted: bool


class InputTokens(CachedTokens):
    cache_write_tokens: int


class ResponseUsage(Answer):
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class IncompleteDetails(Answer):
    reason: Literal["max_output_tokens"]


class ResponseError(Answer):
    code: Literal["server_error", "invalid_prompt"]
    message: str


class Response(Answer):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[
        Annotated[
            MessageItem | ReasoningItem | FunctionCallItem | CustomToolCallItem,
            Discriminator("type"),
        ]
    ]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["auto", "disabled"]
    usage: ResponseUsage | None
    user: str | None
