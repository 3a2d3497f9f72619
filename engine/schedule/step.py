"""A step is data: what the scheduler tells the model runners, and what comes back.

Small, picklable, without tensors, so that the leader can send it to its followers as it is.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class NewRow:
    """A request enters a row of the device tables; whatever the row held before is gone."""

    row: int
    token_ids: list[int]  # all that are known: the prompt, and output when it was preempted
    num_prompt_tokens: int
    block_table: list[int]  # blocks found in the prefix cache
    params: SamplingParams
    seed: int


@dataclass(frozen=True, slots=True)
class ScheduledRow:
    """One request's share of a step: compute tokens start .. start + num_tokens - 1 of its row."""

    request_id: str
    row: int
    start: int
    num_tokens: int
    num_held_blocks: int  # block table length before this step
    new_blocks: list[int]  # appended to the block table in this step
    samples: bool  # whether its last token's logits yield the next token

    @property
    def end(self) -> int:
        """The position of the next token."""
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
    token_ids: list[int]  # one per scheduled row that samples, in the plan's order
    # By index in token_ids, for the rows that ask for them.
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    # The same, for rows whose prompt is computed: from its second token on.
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    # By index in token_ids, why a row cannot go on; its token means nothing.
    errors: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What one step brought a request: its new tokens, and its ending if this was the last."""

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None  # "stop", "length"; "error" with an error
    stop_token: int | None = None  # the token of stop_token_ids that ended it
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None  # one per token, if asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # with the first token, if asked for
    error: str | None = None  # why the engine gives it up, and it alone
