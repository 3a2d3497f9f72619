"""How the tokens of one request are chosen, and when it ends."""

from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from engine.strict import StrictModel
from engine.structured_outputs import StructuredOutputs

MAX_SEED = 2**63 - 1
MAX_LOGPROBS = 20
MAX_STOP = 1024  # characters; the search for one costs its square
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 64

TokenId = Annotated[int, Field(ge=0)]
NonEmpty = Annotated[str, Field(min_length=1)]


class ThinkingLimit(StrictModel):
    """When thoughts are made to end. A server knows its model's marks: thinking_token_budget."""

    budget: int = Field(ge=0, lt=2**31, description="Tokens of thoughts.")
    start: list[TokenId] = Field(
        default_factory=list,
        max_length=64,
        description="What thoughts begin with; [] if they have.",
    )
    end: list[TokenId] = Field(min_length=1, max_length=64, description="What they end with.")


class Pooling(StrictModel):
    """What a prompt's hidden states become: one vector."""

    kind: Literal["last", "mean", "cls", "labels"] = Field(
        "last",
        description="Of the last token, of all, of the first; or of the last token what a "
        "classifier's head gives each label.",
    )
    logits: list[TokenId] = Field(
        default_factory=list,
        max_length=1024,
        description="Not the last token's hidden state, but what it gives these tokens.",
    )

    @model_validator(mode="after")
    def _logits_of_last(self) -> "Pooling":
        if self.logits and self.kind != "last":
            raise ValueError("logits: only of the last token")
        return self


class SamplingParams(StrictModel):
    """Names and meanings as in the OpenAI API and vLLM; defaults as in vLLM."""

    n: int = Field(1, ge=1, le=128, description="Choices per prompt; choice i has seed + i.")
    temperature: float = Field(1.0, ge=0, le=1e6, description="0 is greedy.")
    top_k: int = Field(
        0, ge=-1, lt=2**31, description="Only the k most probable tokens; 0 or -1 is off."
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="Only the smallest set of tokens with this much probability."
    )
    min_p: float = Field(
        0.0, ge=0, le=1, description="Only tokens at least this share as probable as the best one."
    )
    presence_penalty: float = Field(
        0.0, ge=-2, le=2, description="Taken from the logits of tokens that are in the output."
    )
    frequency_penalty: float = Field(
        0.0, ge=-2, le=2, description="The same, for each time that they are in the output."
    )
    repetition_penalty: float = Field(
        1.0,
        ge=1e-3,
        le=1e3,
        description="Divides positive logits of tokens of prompt and output, multiplies others.",
    )
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=4096, description="Added to the logits of these tokens."
    )
    allowed_token_ids: list[TokenId] | None = Field(
        None, min_length=1, description="Only these tokens; None allows all."
    )
    bad_words: list[Annotated[str, Field(min_length=1, max_length=1000)]] = Field(
        default_factory=list, max_length=256, description="Texts whose tokens are never completed."
    )
    bad_words_token_ids: list[
        Annotated[list[TokenId], Field(min_length=1, max_length=MAX_BAD_WORD_TOKENS)]
    ] = Field(
        default_factory=list,
        max_length=MAX_BAD_WORDS,
        description="Token sequences never completed.",
    )
    structured_outputs: StructuredOutputs | None = Field(
        None, description="The form of the text: a JSON schema, regex, choice or grammar."
    )
    pooling: Pooling | None = Field(
        None, description="The prompt as a vector, which comes with the first token."
    )
    thinking_limit: ThinkingLimit | None = Field(
        None, description="Ends the model's thoughts after so many tokens."
    )
    seed: int | None = Field(
        None, ge=-MAX_SEED - 1, le=MAX_SEED, description="One seed, one text; None draws one."
    )
    max_tokens: int | None = Field(
        16,
        ge=1,
        lt=2**31,
        description="Most tokens to generate; None goes on to the end of the window.",
    )
    min_tokens: int = Field(
        0,
        ge=0,
        lt=2**31,
        description="No stop token or string ends the output before this many tokens.",
    )
    ignore_eos: bool = Field(False, description="Go on after the end-of-sequence token.")
    stop: list[Annotated[NonEmpty, Field(max_length=MAX_STOP)]] = Field(
        default_factory=list, max_length=64, description="The text ends before any of these."
    )
    include_stop_str_in_output: bool = Field(
        False, description="The text ends with the stop string or token, not before it."
    )
    stop_token_ids: list[TokenId] = Field(
        default_factory=list, max_length=1024, description="Any of these tokens ends the output."
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Log-probabilities of each output token and of so many most probable ones, "
        "from the model's logits as they are: before penalties, biases and temperature.",
    )
    prompt_logprobs: int | None = Field(
        None, ge=0, le=MAX_LOGPROBS, description="The same for the prompt's tokens."
    )
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")
    detokenize: bool = Field(True, description="False leaves the text empty; tokens only.")
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        lt=2**31,
        description="Keep only so many last tokens of the prompt; -1: what fits.",
    )

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else [] if value is None else value

    @model_validator(mode="after")
    def _min_within_max(self) -> "SamplingParams":
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens: {self.min_tokens} must not exceed max_tokens ({self.max_tokens})"
            )
        return self

    @model_validator(mode="after")
    def _something_to_choose(self) -> "SamplingParams":
        if self.allowed_token_ids is not None and (self.bad_words or self.bad_words_token_ids):
            raise ValueError(
                "allowed_token_ids: it and bad_words exclude each other: together they could leave "
                "no token to choose"
            )
        if self.structured_outputs is not None:
            for name in ("min_tokens", "ignore_eos", "allowed_token_ids", "bad_words"):
                if getattr(self, name) or (name == "bad_words" and self.bad_words_token_ids):
                    raise ValueError(
                        f"{name}: it cannot be combined with structured_outputs, which alone "
                        "decides what may come next: together they could leave no token to choose"
                    )
        if self.stop and not self.detokenize:
            raise ValueError("stop: stop strings are found in the text; they need detokenize")
        if self.truncate_prompt_tokens == 0:
            raise ValueError("truncate_prompt_tokens: at least 1, or -1 for what fits (got 0)")
        return self

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    def truncated(self, prompt_token_ids: list[int], max_len: int) -> list[int]:
        """The prompt as `truncate_prompt_tokens` has it, in a window of max_len tokens."""
        limit = self.truncate_prompt_tokens
        if limit is None:
            return prompt_token_ids
        return prompt_token_ids[-(max_len - 1 if limit == -1 else limit) :]

    def longest(self, num_prompt: int, max_len: int) -> int:
        """Tokens that prompt and output may come to, in a window of max_len tokens."""
        return min(max_len, num_prompt + (max_len if self.max_tokens is None else self.max_tokens))

    def end_tokens(self, eos_token_ids: Collection[int]) -> frozenset[int]:
        """Those that end the output."""
        own = frozenset(self.stop_token_ids)
        return own if self.ignore_eos else own.union(eos_token_ids)

    def choices(self, seed: int) -> "list[tuple[SamplingParams, int]]":
        """Parameters and seed of each of the n outputs; only the first asks about the prompt.

        Choice i has seed + i, as 64 bits count.
        """
        first = self if self.n == 1 else self.model_copy(update={"n": 1})
        others = first.model_copy(update={"prompt_logprobs": None})
        seeds = [(seed + i + MAX_SEED + 1) % 2**64 - MAX_SEED - 1 for i in range(self.n)]
        return list(zip([first] + [others] * (self.n - 1), seeds, strict=True))

    def in_tokens(
        self, encode_bad_words: Callable[[Sequence[str]], list[list[int]]]
    ) -> "SamplingParams":
        """The same for an engine, which knows no words: bad_words as bad_words_token_ids.

        Raises ValueError when they are more, or longer, than those may be.

        Args:
            encode_bad_words: a tokenizer's.
        """
        if not self.bad_words:
            return self
        words = encode_bad_words(self.bad_words)
        longest = max(map(len, words), default=0)
        if longest > MAX_BAD_WORD_TOKENS:
            raise ValueError(
                f"bad_words: one of them is {longest} tokens; at most {MAX_BAD_WORD_TOKENS}"
            )
        sequences = self.bad_words_token_ids + words
        if len(sequences) > MAX_BAD_WORDS:
            raise ValueError(
                f"bad_words: with bad_words_token_ids they are {len(sequences)} sequences of "
                f"tokens; at most {MAX_BAD_WORDS}"
            )
        return self.model_copy(update={"bad_words": [], "bad_words_token_ids": sequences})
