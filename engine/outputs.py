"""What `LLM` returns; names as in vLLM."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Logprob:
    """The log-probability of one token at one position."""

    logprob: float
    rank: int  # 1 is the most probable
    decoded_token: str | None = None  # None without a tokenizer


@dataclass(frozen=True)
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str  # "stop" or "length"
    stop_reason: int | str | None = None  # the stop string or token of stop_token_ids that was met
    cumulative_logprob: float | None = None  # of its tokens, if logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # by token id, for each of its tokens


@dataclass(frozen=True)
class RequestMetrics:
    """Seconds on the clock of time.monotonic()."""

    arrival_time: float
    first_token_time: float
    finished_time: float

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.first_token_time - self.arrival_time

    @property
    def latency(self) -> float:
        """Seconds from arrival to the end."""
        return self.finished_time - self.arrival_time


@dataclass(frozen=True)
class RequestOutput:
    request_id: str
    prompt: str | None  # None when the prompt was given as token ids
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int
    metrics: RequestMetrics
    # For each token of the prompt, if asked for; None for the first, which nothing precedes.
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    finished: bool = True
    vector: list[float] | None = None  # the prompt, pooled, if asked for


@dataclass(frozen=True)
class EmbeddingOutput:
    embedding: list[float]


@dataclass(frozen=True)
class EmbeddingRequestOutput:
    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True


@dataclass(frozen=True)
class ClassificationOutput:
    probs: list[float]

    @property
    def num_classes(self) -> int:
        return len(self.probs)


@dataclass(frozen=True)
class ClassificationRequestOutput:
    request_id: str
    outputs: ClassificationOutput
    prompt_token_ids: list[int]
    finished: bool = True


@dataclass(frozen=True)
class ScoringOutput:
    score: float


@dataclass(frozen=True)
class ScoringRequestOutput:
    request_id: str
    outputs: ScoringOutput
    finished: bool = True
