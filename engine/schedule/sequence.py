"""A request as the scheduler has it: how far it has come, and what it holds."""

from collections.abc import Sequence as Listed
from dataclasses import dataclass, field

from engine.schedule.request import Request


@dataclass(eq=False, slots=True)
class Sequence:
    """The tokens of one request, in a row while it runs."""

    request: Request
    max_len: int  # prompt + output tokens at which it must end
    stop_tokens: frozenset[int]  # any of which ends it
    turn: int  # in which it is served, fairly among the flows
    order: tuple[int, int, int]  # its place in queue and batch
    held: tuple[object, ...] = ()  # what it must keep alive
    id: str = field(init=False)
    is_live: bool = field(init=False, default=True)  # it has not ended
    token_ids: list[int] = field(init=False)  # prompt and output so far
    waits_since: float = field(init=False, default=0.0)  # on the clock of time.monotonic()
    # How long it waited for its row, in seconds: each time since its last tokens.
    waits: list[float] = field(init=False, default_factory=list)
    row: int = field(init=False, default=-1)  # its index in the device's tables while running
    # By cache group, all of the same length; -1 stands for a block that it has given back.
    block_tables: list[list[int]] = field(init=False, default_factory=list)
    num_given_back: list[int] = field(init=False, default_factory=list)  # of each, from the left
    block_hashes: list[bytes] = field(init=False, default_factory=list)  # of full, known blocks
    num_published: int = field(init=False, default=0)  # leading blocks named in the pools
    num_tokens: int = field(init=False)  # with those that steps in flight are sampling
    num_computed: int = field(init=False, default=0)  # tokens whose KV is, or will be, in the cache
    # In flight, not known to be its tokens; it is in no later step before they have been judged.
    drafts: Listed[int] = field(init=False, default=())
    num_drafted: int = field(init=False, default=0)  # tokens guessed, those in flight left out
    num_accepted: int = field(init=False, default=0)
    num_predicted: tuple[int, int] = field(init=False, default=(0, 0))  # as in `TokenDelta`
    num_cached: int | None = field(init=False, default=None)  # prompt tokens found in the cache

    def __post_init__(self) -> None:
        self.id = self.request.id
        self.token_ids = self.request.prompt_token_ids + self.request.output_token_ids
        self.num_tokens = len(self.token_ids)

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt :]

    @property
    def wants_all_of_prompt(self) -> bool:
        """For what comes of all its tokens, with the first output; who has one has it already."""
        params = self.request.params
        wanted = params.prompt_logprobs is not None
        wanted |= params.pooling is not None and params.pooling.kind in ("mean", "cls")
        return wanted and len(self.token_ids) == self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that are being sampled."""
        return self.num_tokens - len(self.token_ids)

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed
