"""A request as the scheduler has it: how far it has come, and what it holds."""

import time
from dataclasses import dataclass, field

from engine.schedule.request import Request


@dataclass(eq=False, slots=True)
class Sequence:
    """The tokens of one request, in a row while it runs."""

    request: Request
    max_len: int  # prompt + output tokens at which it must end
    turn: int  # in which it is served, fairly among the flows
    order: tuple[int, int, int]  # its place in queue and batch
    held: tuple[object, ...] = ()  # what it must keep alive
    token_ids: list[int] = field(init=False)  # prompt and output so far
    arrived_at: float = field(init=False, default_factory=time.monotonic)
    row: int = field(init=False, default=-1)  # its index in the device's tables while running
    # By cache group, all of the same length; -1 stands for a block that it has given back.
    block_tables: list[list[int]] = field(init=False, default_factory=list)
    num_given_back: list[int] = field(init=False, default_factory=list)  # of each, from the left
    block_hashes: list[bytes] = field(init=False, default_factory=list)  # of full, known blocks
    num_published: int = field(init=False, default=0)  # leading blocks named in the pools
    num_computed: int = field(init=False, default=0)  # tokens whose KV is, or will be, in the cache
    num_pending: int = field(init=False, default=0)  # tokens being sampled by steps in flight
    num_cached: int | None = field(init=False, default=None)  # prompt tokens found in the cache

    def __post_init__(self) -> None:
        self.token_ids = self.request.prompt_token_ids + self.request.output_token_ids

    @property
    def id(self) -> str:
        return self.request.id

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
        wanted |= params.pooling is not None and params.pooling.kind != "last"
        return wanted and len(self.token_ids) == self.num_prompt

    @property
    def num_tokens(self) -> int:
        """Prompt and output, counting tokens that are still being sampled."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed
