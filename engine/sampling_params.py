"""How the tokens of one request are chosen, and when it ends."""

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from engine.strict import StrictModel

MAX_SEED = 2**63 - 1


class SamplingParams(StrictModel):
    """Names and meanings as in the OpenAI API and vLLM; defaults as in vLLM."""

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
    seed: int | None = Field(
        None, ge=-MAX_SEED - 1, le=MAX_SEED, description="One seed, one text; None draws one."
    )
    max_tokens: int | None = Field(
        16, ge=1, description="Most tokens to generate; None goes on to the end of the window."
    )
    min_tokens: int = Field(
        0, ge=0, description="No stop token or string ends the output before this many tokens."
    )
    ignore_eos: bool = Field(False, description="Go on after the end-of-sequence token.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list, max_length=64, description="The text ends before any of these."
    )
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(
        default_factory=list, max_length=1024, description="Any of these tokens ends the output."
    )
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop_string(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else [] if value is None else value

    @model_validator(mode="after")
    def _min_within_max(self) -> "SamplingParams":
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens ({self.min_tokens}) must not exceed max_tokens ({self.max_tokens})"
            )
        return self
