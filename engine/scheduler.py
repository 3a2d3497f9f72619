"""Decides what each step computes.

There is no prefill phase and no decode phase: a request has computed tokens and catches up with the
tokens it has. Each step gives its token budget to running requests first, then to waiting ones, in
chunks where a prompt is longer than what is left. (After vLLM's v1 scheduler and Sarathi-Serve,
Agrawal et al., OSDI 2024.)

Steps may be scheduled ahead of results: a token that is still being sampled counts as pending, and
its successor can be planned because the token itself never leaves the device. Steps execute in the
order in which they were scheduled, on every rank. This is why blocks and rows can be handed on, and
full blocks published, at scheduling time: whoever gets them runs later.
"""

import time
from bisect import insort
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.request import Request
from engine.step import NewRow, ScheduledRow, StepPlan, StepResult, TokenDelta, TokenLogprobs
from engine.turns import Turns

# What a later turn counts for, with the policy "shortest": a prompt that is longer by n tokens is
# overtaken by n / 32 requests of its flow at most.
_AGEING_TOKENS = 32


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    restored_tokens: int = 0  # of all that were found cached, those from host memory
    output_tokens: int = 0
    preemptions: int = 0
    admitted: int = 0
    queue_time_s: float = 0.0  # of all admitted requests together


class Scheduler:
    """Owns every live request, the rows and the block pool."""

    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        max_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.pool = pool
        self.stats = SchedulerStats()
        self.requests: dict[str, Request] = {}
        # Both in the policy's order: the first to be admitted, the last to be preempted.
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self._policy = config.scheduling_policy
        self._num_arrivals = 0
        self._turns = Turns()
        self._block_size = config.block_size
        self._token_budget = config.max_num_batched_tokens
        self._free_rows = list(reversed(range(config.max_num_seqs)))
        self._max_len = max_len
        # Per step in flight, who gets its tokens: an id alone may have found another owner.
        self._sampling: deque[list[Request]] = deque()
        self._eos_token_ids = eos_token_ids

    def add(self, request: Request) -> None:
        """Queue a request that `RequestLimits.check` has passed."""
        if request.id in self.requests:
            raise ValueError(f"a request with id {request.id!r} is already live")
        request.max_len = self._max_len
        if request.params.max_tokens is not None:
            request.max_len = min(
                self._max_len, len(request.prompt_token_ids) + request.params.max_tokens
            )
        if len(request.token_ids) >= request.max_len:
            raise ValueError(f"request {request.id!r} has all its {request.max_len} tokens already")
        request.turn = self._turns.take(request.flow)
        request.order = self._order(request)
        self.requests[request.id] = request
        self._wait(request)

    def _order(self, request: Request) -> tuple[int, int, int]:
        """The policy: what is least goes first, and it never changes."""
        self._num_arrivals += 1
        if self._policy == "priority":
            return request.priority, request.turn, self._num_arrivals
        if self._policy == "shortest":
            aged = len(request.token_ids) + request.turn * _AGEING_TOKENS
            return aged, request.turn, self._num_arrivals
        return 0, request.turn, self._num_arrivals

    def _wait(self, request: Request) -> None:
        insort(self.waiting, request, key=_order)
        self._turns.wait(request.flow)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown ids are ignored, for it may just have finished."""
        request = self.requests.get(request_id)
        if request is not None:
            self._remove(request)

    def schedule(self) -> StepPlan | None:
        """Plan one step; None when nothing can run before a result arrives.

        Rows that compute one token come first: attention has a kernel of its own for them.
        """
        plan = StepPlan([], [])
        preemptions = self.stats.preemptions
        budget = self._schedule_running(plan, self._token_budget)
        if self.stats.preemptions == preemptions:
            self._schedule_waiting(plan, budget)
        if not plan.scheduled:
            return None
        plan.copies.extend(self.pool.take_copies())
        plan.scheduled.sort(key=lambda row: row.num_tokens > 1)
        self._sampling.append([self.requests[r.request_id] for r in plan.scheduled if r.samples])
        return plan

    def _schedule_running(self, plan: StepPlan, budget: int) -> int:
        """Returns the budget that is left.

        The budget is at least the number of rows, and a token of it is kept for every row yet to
        come, so none starves.
        """
        index = 0
        while index < len(self.running):  # preemption shortens the list from its end
            request = self.running[index]
            index += 1
            num_tokens = min(request.num_uncomputed, budget - (len(self.running) - index))
            if num_tokens == 0 or request.num_tokens >= request.max_len:
                continue  # its last token is being sampled
            if self._make_room(request, num_tokens):
                self._plan_row(plan, request, num_tokens)
                budget -= num_tokens
        return budget

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Preempt the last in order until the next tokens of a running request have blocks.

        Victims are later in the running list than `request`, so none is in the plan yet. False
        when the request itself had to go.
        """
        while self._num_new_blocks(request, num_tokens) > self.pool.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        """Back to its place in the queue; what is not evicted by then is found in the cache."""
        self._release(request)
        request.num_computed = request.num_published = 0
        self._wait(request)
        self.stats.preemptions += 1

    def _schedule_waiting(self, plan: StepPlan, budget: int) -> None:
        while self.waiting and self._free_rows and budget > 0:
            request = self.waiting[0]
            if request.num_pending > 0:
                break  # preempted while its next token was being sampled: wait for that
            cached = self._find_cached(request)
            if not self._can_admit(request, cached):
                break
            self.waiting.pop(0)
            self._turns.leave(request.flow, request.turn)
            self._admit(plan, request, cached)
            num_tokens = min(request.num_uncomputed, budget)
            self._plan_row(plan, request, num_tokens)
            budget -= num_tokens

    def _find_cached(self, request: Request) -> list[int]:
        """Blocks of the longest prefix in the KV cache."""
        return self.pool.lookup(self._reusable(request))

    def _reusable(self, request: Request) -> list[bytes]:
        """Names of the full blocks that need not be computed if they are cached.

        They leave a token to compute, for its logits.
        """
        if request.wants_prompt_logprobs:
            return []  # needs the logits of all its tokens
        hashes = request.hash_full_blocks(self._block_size)
        return hashes[: (request.num_tokens - 1) // self._block_size]

    def _can_admit(self, request: Request, cached: list[int]) -> bool:
        """Whether all its tokens fit next to what the running ones still need for theirs.

        One further block for each running request keeps the newcomer from being thrown out at
        the next block boundary. An idle engine takes whatever fits the pool.
        """
        needed = self._num_blocks(request.num_tokens) - len(cached)
        needed += sum(self.pool.is_free(block) for block in cached)
        for other in self.running:
            needed += self._num_new_blocks(other, other.num_uncomputed) + 1
        return needed <= self.pool.num_free

    def _admit(self, plan: StepPlan, request: Request, cached: list[int]) -> None:
        self.pool.hold(cached)
        restored = self.pool.restore(self._reusable(request)[len(cached) :])
        cached = cached + restored
        self.stats.restored_tokens += len(restored) * self._block_size
        request.block_table = list(cached)
        request.num_computed = len(cached) * self._block_size
        request.num_published = len(cached)
        if request.num_cached is None and not request.output_token_ids:
            request.num_cached = request.num_computed
            self.stats.cached_tokens += request.num_computed
            self.stats.prompt_tokens += len(request.prompt_token_ids)
            self.stats.admitted += 1
            self.stats.queue_time_s += time.monotonic() - request.arrived_at
        request.row = self._free_rows.pop()
        insort(self.running, request, key=_order)
        plan.new_rows.append(
            NewRow(
                request.row,
                list(request.token_ids),
                len(request.prompt_token_ids),
                cached,
                request.params,
                request.seed,
            )
        )

    def _plan_row(self, plan: StepPlan, request: Request, num_tokens: int) -> None:
        """Add a row to the plan and advance the request as if the step had run."""
        num_held = len(request.block_table)
        new_blocks = self.pool.allocate(self._num_new_blocks(request, num_tokens))
        request.block_table += new_blocks
        start = request.num_computed
        samples = start + num_tokens == request.num_tokens
        plan.scheduled.append(
            ScheduledRow(
                request.id,
                request.row,
                start,
                num_tokens,
                num_held,
                new_blocks,
                samples,
            )
        )
        request.num_computed += num_tokens
        request.num_pending += samples
        self._publish(request)

    def _publish(self, request: Request) -> None:
        """Name the blocks that are full of known and computed tokens."""
        num_full = min(request.num_computed, len(request.token_ids)) // self._block_size
        if num_full > request.num_published:
            hashes = request.hash_full_blocks(self._block_size)
            for i in range(request.num_published, num_full):
                self.pool.publish(request.block_table[i], hashes[i])
            request.num_published = num_full

    def update(self, plan: StepPlan, result: StepResult) -> list[TokenDelta]:
        """Take in the tokens of the oldest step in flight. Requests gone meanwhile are skipped."""
        deltas = []
        sampling = self._sampling.popleft()
        for i, (request, token) in enumerate(zip(sampling, result.token_ids, strict=True)):
            if self.requests.get(request.id) is not request:
                continue
            request.num_pending -= 1
            if i in result.errors:
                self._remove(request)
                deltas.append(TokenDelta(request.id, [], "error", error=result.errors[i]))
                continue
            request.append(token)
            self._publish(request)
            delta = self._delta(
                request, token, result.logprobs.get(i), result.prompt_logprobs.get(i)
            )
            if delta.finish_reason is not None:
                self._remove(request)
            deltas.append(delta)
        self.stats.output_tokens += len(deltas)
        return deltas

    def _delta(
        self,
        request: Request,
        token: int,
        logprobs: TokenLogprobs | None,
        prompt_logprobs: list[TokenLogprobs] | None,
    ) -> TokenDelta:
        reason, stop_token = None, None
        if token in request.params.stop_token_ids:
            reason, stop_token = "stop", token
        elif token in self._eos_token_ids and not request.params.ignore_eos:
            reason = "stop"
        elif len(request.token_ids) >= request.max_len:
            reason = "length"
        return TokenDelta(
            request.id,
            [token],
            reason,
            stop_token,
            request.num_cached or 0,
            None if logprobs is None else [logprobs],
            prompt_logprobs,
        )

    def _remove(self, request: Request) -> None:
        del self.requests[request.id]
        if request.row >= 0:
            self._release(request)
        else:
            self.waiting.remove(request)
            self._turns.leave(request.flow)

    def _release(self, request: Request) -> None:
        self.running.remove(request)
        self.pool.free(request.block_table)
        request.block_table = []
        self._free_rows.append(request.row)
        request.row = -1

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _num_new_blocks(self, request: Request, num_tokens: int) -> int:
        return self._num_blocks(request.num_computed + num_tokens) - len(request.block_table)

    def live_block_tables(self) -> Iterator[list[int]]:
        return (request.block_table for request in self.requests.values())


def _order(request: Request) -> tuple[int, int, int]:
    return request.order
