"""A request as the engine knows it: tokens in, tokens out, and how far it has come."""

import itertools
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.block_pool import extend_hashes
from engine.sampling_params import SamplingParams


@dataclass(eq=False, slots=True)
class Request:
    """One prompt and its output.

    `output_token_ids` may start non-empty: a request resumed elsewhere goes on where it was, and as
    its random numbers depend on (seed, position) alone, it goes on with the same text.
    """

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    cache_salt: str = ""
    output_token_ids: list[int] = field(default_factory=list)
    priority: int = 0  # smaller is sooner, with the scheduling policy "priority"
    flow: str = ""  # requests of one flow take turns with those of others

    # What the scheduler keeps.
    turn: int = field(init=False, default=0)  # in which it is served, fairly among the flows
    order: tuple[int, int, int] = field(init=False, default=(0, 0, 0))  # in queue and batch
    arrived_at: float = field(init=False, default_factory=time.monotonic)
    token_ids: list[int] = field(init=False)  # prompt and output so far
    max_len: int = field(init=False, default=0)  # prompt + output tokens at which it must end
    row: int = field(init=False, default=-1)  # its index in the device's tables while running
    block_table: list[int] = field(init=False, default_factory=list)
    block_hashes: list[bytes] = field(init=False, default_factory=list)  # of full, known blocks
    num_published: int = field(init=False, default=0)  # leading blocks named in the pool
    num_computed: int = field(init=False, default=0)  # tokens whose KV is, or will be, in the cache
    num_pending: int = field(init=False, default=0)  # tokens being sampled by steps in flight
    grammar: Any = field(init=False, default=None)  # compiled from its structured_outputs
    num_cached: int | None = field(init=False, default=None)  # prompt tokens found in the cache

    def __post_init__(self) -> None:
        self.token_ids = self.prompt_token_ids + self.output_token_ids

    @property
    def wants_prompt_logprobs(self) -> bool:
        """They come with the first output token; who has one has them already."""
        return self.params.prompt_logprobs is not None and not self.output_token_ids

    @property
    def num_tokens(self) -> int:
        """Prompt and output, counting tokens that are still being sampled."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    def append(self, token: int) -> None:
        self.output_token_ids.append(token)
        self.token_ids.append(token)

    def hash_full_blocks(self, block_size: int) -> list[bytes]:
        """Hashes of all full blocks of known tokens, extended as the tokens grow."""
        extend_hashes(self.block_hashes, self.token_ids, block_size, self.cache_salt)
        return self.block_hashes


@dataclass(frozen=True)
class RequestLimits:
    """What a request may ask of an engine; the front checks it before it queues anything."""

    vocab_size: int
    max_model_len: int
    num_blocks: int
    block_size: int
    eos_token_ids: Collection[int] = ()

    @property
    def max_len(self) -> int:
        """Most tokens, prompt and output together, that fit the window and the empty pool."""
        return min(self.max_model_len, self.num_blocks * self.block_size)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Raises ValueError when the engine could never serve this request."""
        length = len(prompt_token_ids)
        if length == 0:
            raise ValueError("the prompt is empty; at least one token is needed")
        if length >= self.max_len:
            limit = (
                f"the context window is {self.max_model_len} tokens"
                if self.max_model_len == self.max_len
                else f"the KV cache holds {self.max_len} tokens ({self.num_blocks} blocks of "
                f"{self.block_size}); raise num_blocks"
            )
            raise ValueError(
                f"the prompt has {length} tokens, and with one token of output must fit: {limit}"
            )
        for name, tokens in (
            ("prompt", prompt_token_ids),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("bad_words_token_ids", itertools.chain(*params.bad_words_token_ids)),
        ):
            out_of_range = [t for t in tokens if not 0 <= t < self.vocab_size]
            if out_of_range:
                raise ValueError(
                    f"{name}: token id {out_of_range[0]} is outside the vocabulary "
                    f"(0 to {self.vocab_size - 1})"
                )
        stops = set(params.stop_token_ids)
        if not params.ignore_eos:
            stops |= set(self.eos_token_ids)
        if (
            params.min_tokens > 0
            and params.allowed_token_ids is not None
            and (stops.issuperset(params.allowed_token_ids))
        ):
            raise ValueError(
                "allowed_token_ids: all of them end the output, which min_tokens does not allow; "
                "add others or leave min_tokens out"
            )
