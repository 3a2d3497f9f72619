"""A step is data: what the scheduler tells the model runners, and what comes back.

Small, picklable, without tensors, so that the leader can send it to its followers as it is.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRow:
    """A request enters a row of the device tables; whatever the row held before is gone."""

    row: int
    token_ids: list[int]  # all that are known: the prompt, and output when it was preempted
    num_prompt_tokens: int
    block_tables: list[list[int]]  # by cache group: blocks found in the prefix cache, -1 for none
    params: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledRow:
    """One request's share of a step: compute tokens start .. start + num_tokens - 1 of its row."""

    request_id: str
    row: int
    start: int
    num_tokens: int
    num_held_blocks: int  # length of its block tables before this step
    new_blocks: list[list[int]]  # by cache group: appended to the block table in this step
    num_sampled: int  # of its last tokens, whose logits each yield the token that follows

    @property
    def end(self) -> int:
        """The position of the token after its last."""
        return self.start + self.num_tokens


class BlockCopy(NamedTuple):
    """A block of the KV cache to a slot of host memory, or back."""

    to_host: bool
    block: int
    slot: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    new_rows: list[NewRow]
    scheduled: list[ScheduledRow]
    copies: list[BlockCopy] = field(default_factory=list)  # in this order, before all else

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.scheduled)


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position: of its token, then of the most probable ones in order."""

    rank: int  # of its token; 1 is the most probable
    token_ids: list[int]
    logprobs: list[float]


@dataclass(frozen=True, slots=True)
class StepResult:
    """Lists by the scheduled rows that sample, in the plan's order; dicts by index in those."""

    token_ids: list[list[int]]  # what each row goes on with
    logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)  # one per token
    # Of rows whose prompt is computed: from its second token on.
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    vectors: dict[int, list[float]] = field(default_factory=dict)  # the prompts', pooled
    # Why a row cannot go on; its tokens mean nothing.
    errors: dict[int, str] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)  # not frozen: there is one per row and step
class TokenDelta:
    """What one step brought a request: its new tokens, and its ending if this was the last."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop", "length"; "error" with an error
    stop_token: int | None = None  # the token of stop_token_ids that ended it
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None  # one per token, if asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # with the first token, if asked for
    vector: list[float] | None = None  # the prompt, pooled, if asked for
    error: str | None = None  # why the engine gives it up, and it alone

    @classmethod
    def failed(cls, request_id: str, error: str) -> "TokenDelta":
        return cls(request_id=request_id, finish_reason="error", error=error)
