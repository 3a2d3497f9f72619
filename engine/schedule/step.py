"""A step is data: what the scheduler tells the model runners, and what comes back.

Small, picklable, without tensors, so that the leader can send it to its followers as it is. What
there is of every row lies in columns, arrays that cost next to nothing to make and to send.
"""

from array import array
from collections.abc import Sequence
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


class ScheduledRow(NamedTuple):
    """One request's share of a step: compute tokens start .. start + num_tokens - 1 of its row."""

    row: int
    start: int
    num_tokens: int
    num_sampled: int  # of its last tokens, whose logits each yield the token that follows

    @property
    def end(self) -> int:
        """The position of the token after its last."""
        return self.start + self.num_tokens


class NewBlock(NamedTuple):
    """A block that a row's table gets in this step."""

    group: int  # of layers that cache alike
    row: int
    place: int  # in the table
    block: int


class BlockCopy(NamedTuple):
    """A block of the KV cache to a slot of host memory, or back."""

    to_host: bool
    block: int
    slot: int


class Drafts(NamedTuple):
    """Tokens that are not known to come, for a step to compute as if they were a row's last."""

    row: int
    position: int  # of the first
    token_ids: Sequence[int]


def _column() -> "array[int]":
    return array("i")


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Entry i of each column is of the i-th row that computes something, as in `ScheduledRow`."""

    new_rows: list[NewRow] = field(default_factory=list)
    copies: list[BlockCopy] = field(default_factory=list)  # in this order, before all else
    new_blocks: list[NewBlock] = field(default_factory=list)
    rows: "array[int]" = field(default_factory=_column)
    starts: "array[int]" = field(default_factory=_column)
    lengths: "array[int]" = field(default_factory=_column)  # num_tokens
    num_sampled: "array[int]" = field(default_factory=_column)
    drafts: list[Drafts] = field(default_factory=list)

    def add(
        self,
        row: int,
        start: int,
        num_tokens: int,
        num_sampled: int,
        drafts: Sequence[int] = (),
    ) -> None:
        """
        Args:
            drafts: the last of the tokens that it computes, which are not known to come; it samples
                one more than these.
        """
        self.rows.append(row)
        self.starts.append(start)
        self.lengths.append(num_tokens)
        self.num_sampled.append(num_sampled)
        if drafts:
            self.drafts.append(Drafts(row, start + num_tokens - len(drafts), drafts))

    def put_in_order(self, order: list[int]) -> None:
        """Entry order[i] of each column becomes the i-th."""
        for column in (self.rows, self.starts, self.lengths, self.num_sampled):
            column[:] = array("i", [column[i] for i in order])

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def scheduled(self) -> list[ScheduledRow]:
        """The columns row by row, for who is in no hurry."""
        columns = zip(self.rows, self.starts, self.lengths, self.num_sampled, strict=True)
        return [ScheduledRow(*entry) for entry in columns]


class DraftRow(NamedTuple):
    """A row for a draft model to go on with; all its tokens but the last are in the cache."""

    row: int
    position: int  # of its last token
    num_drafts: int
    num_pending: int  # of its tokens, which only the device knows


class DraftedTokens(NamedTuple):
    """What a draft model says, row by row."""

    token_ids: list[list[int]]  # from the first that was pending on
    seconds: float  # that each of its steps took


def count_accepted(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """How many drafts come true: the first ones that are what has been sampled in their places."""
    pairs = enumerate(zip(drafts, sampled, strict=False))
    return next((i for i, (draft, token) in pairs if draft != token), len(drafts))


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


@dataclass(slots=True)  # not frozen: there is one per row and step
class TokenDelta:
    """What a step brought a request: its new tokens, and its ending if this was the last."""

    request_id: str
    token_ids: list[int]
    num_cached_tokens: int = 0
    finish_reason: str | None = None  # "stop", "length"; "error" with an error
    stop_token: int | None = None  # the token of stop_token_ids that ended it
    logprobs: list[TokenLogprobs] | None = None  # one per token, if asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # with the first token, if asked for
    vector: list[float] | None = None  # the prompt, pooled, if asked for
    error: str | None = None  # why the engine gives it up, and it alone
    # Tokens of its prediction so far: those that came, and those that did not.
    num_predicted: tuple[int, int] = (0, 0)
    waits: Sequence[float] = ()  # how long it has waited for a row since its last tokens, seconds
    num_drafted: tuple[int, int] = (0, 0)  # tokens guessed, and those that were right; at its end

    def take_from(self, result: StepResult, row: int) -> None:
        """What else a step has brought the row."""
        if row in result.logprobs:
            self.logprobs = result.logprobs[row][: len(self.token_ids)]
        self.prompt_logprobs = result.prompt_logprobs.get(row)
        self.vector = result.vectors.get(row)
        if self.vector is not None:
            self.token_ids = []  # what was sampled behind the prompt is not asked for

    def extend(self, later: "TokenDelta") -> None:
        """Append what later steps have brought the same request."""
        self.token_ids += later.token_ids
        if self.logprobs is not None and later.logprobs is not None:
            self.logprobs += later.logprobs
        self.finish_reason, self.stop_token = later.finish_reason, later.stop_token
        self.vector, self.error = later.vector, later.error
        self.num_predicted, self.num_drafted = later.num_predicted, later.num_drafted
        self.waits = [*self.waits, *later.waits]

    @classmethod
    def failed(cls, request_id: str, error: str) -> "TokenDelta":
        return cls(request_id, [], finish_reason="error", error=error)
