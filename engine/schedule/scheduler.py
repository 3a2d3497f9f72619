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
from dataclasses import dataclass, replace

from engine.config import EngineConfig
from engine.schedule.block_pool import BlockPool
from engine.schedule.block_tables import BlockTables
from engine.schedule.request import Request
from engine.schedule.sequence import Sequence
from engine.schedule.shares import FairTurns
from engine.schedule.step import (
    NewRow,
    ScheduledRow,
    StepPlan,
    StepResult,
    TokenDelta,
    TokenLogprobs,
)
from engine.schedule.turns import Turns

# What a later turn counts for, with the policy "shortest": a prompt that is longer by n tokens is
# overtaken by n / 32 requests of its flow at most.
_AGEING_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Step:
    """A plan, and who gets the tokens it brings: an id may have another owner by then."""

    plan: StepPlan
    sampling: list[Sequence]


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
    """Owns every live sequence, the rows and the blocks."""

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockTables,
        max_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.blocks = blocks
        self.stats = SchedulerStats()
        self.sequences: dict[str, Sequence] = {}
        # Both in the policy's order: the first to be admitted, the last to be preempted.
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._policy = config.scheduling_policy
        self._num_arrivals = 0
        self._turns = FairTurns() if config.scheduling_policy == "fair" else Turns()
        self._lacks_blocks = False  # for the first of those who wait
        self._block_size = config.block_size
        self._token_budget = config.max_num_batched_tokens
        self._free_rows = list(reversed(range(config.max_num_seqs)))
        self._max_len = max_len
        self._eos_token_ids = eos_token_ids

    @property
    def pool(self) -> BlockPool:
        """The first group's, of all tokens if there is one."""
        return self.blocks.pools[0]

    def add(self, request: Request, held: tuple[object, ...] = ()) -> Sequence:
        """Queue a request that `RequestLimits.check` has passed.

        Args:
            held: what is to be kept alive as long as the request is.
        """
        if request.id in self.sequences:
            raise ValueError(f"a request with id {request.id!r} is already live")
        max_len = self._max_len
        if request.params.max_tokens is not None:
            max_len = min(max_len, len(request.prompt_token_ids) + request.params.max_tokens)
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        if num_tokens >= max_len:
            raise ValueError(f"request {request.id!r} has all its {max_len} tokens already")
        turn = self._turns.take(request.flow)
        sequence = Sequence(request, max_len, turn, self._rank(request, turn), held)
        self.sequences[request.id] = sequence
        self._wait(sequence)
        return sequence

    def _rank(self, request: Request, turn: int) -> tuple[int, int, int]:
        """The policy: what is least goes first, and it never changes."""
        self._num_arrivals += 1
        if self._policy == "priority":
            return request.priority, turn, self._num_arrivals
        if self._policy == "shortest":
            num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
            return num_tokens + turn * _AGEING_TOKENS, turn, self._num_arrivals
        return 0, turn, self._num_arrivals

    def _wait(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_order)
        self._turns.wait(sequence.request.flow)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown ids are ignored, for it may just have finished."""
        sequence = self.sequences.get(request_id)
        if sequence is not None:
            self._remove(sequence)

    def schedule(self) -> Step | None:
        """Plan one step; None when nothing can run before a result arrives.

        Rows that compute one token come first: attention has a kernel of its own for them.
        """
        plan = StepPlan([], [])
        if self.waiting and (self._lacks_blocks or not self._free_rows):
            self._make_way()
        preemptions = self.stats.preemptions
        budget = self._schedule_running(plan, self._token_budget)
        if self.stats.preemptions == preemptions:
            self._schedule_waiting(plan, budget)
        if not plan.scheduled:
            return None
        plan.copies.extend(self.blocks.take_copies())
        plan.scheduled.sort(key=lambda row: row.num_tokens > 1)
        return Step(plan, [self.sequences[r.request_id] for r in plan.scheduled if r.num_sampled])

    def _make_way(self) -> None:
        """For who is due to run, where others have more rows than they are due."""
        victim = self._turns.victim(self._turns.first(self.waiting), self.running)
        if victim is not None:
            self._preempt(victim)

    def _schedule_running(self, plan: StepPlan, budget: int) -> int:
        """Returns the budget that is left.

        The budget is at least the number of rows, and a token of it is kept for every row yet to
        come, so none starves.
        """
        index = 0
        while index < len(self.running):  # preemption shortens the list from its end
            sequence = self.running[index]
            index += 1
            num_tokens = min(sequence.num_uncomputed, budget - (len(self.running) - index))
            if num_tokens == 0 or sequence.num_tokens >= sequence.max_len:
                continue  # its last token is being sampled
            if self._make_room(sequence, num_tokens):
                self._plan_row(plan, sequence, num_tokens)
                budget -= num_tokens
        return budget

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Preempt the last in order until the next tokens of a running sequence have blocks.

        Victims are later in the running list than `sequence`, so none is in the plan yet. False
        when the sequence itself had to go.
        """
        self.blocks.trim(sequence)
        while not self.blocks.fit(self.blocks.num_new(sequence, num_tokens)):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Back to its place in the queue; what is not evicted by then is found in the cache."""
        self._release(sequence)
        self._wait(sequence)
        self.stats.preemptions += 1

    def _schedule_waiting(self, plan: StepPlan, budget: int) -> None:
        while self.waiting and self._free_rows and budget > 0:
            sequence = self._turns.first(self.waiting)
            if sequence.num_pending > 0:
                break  # preempted while its next token was being sampled: wait for that
            cached = self.blocks.find_cached(sequence)
            self._lacks_blocks = not self.blocks.can_admit(sequence, cached, self.running)
            if self._lacks_blocks:
                break
            self.waiting.remove(sequence)
            self._turns.leave(sequence.request.flow, sequence.turn)
            self._admit(plan, sequence, cached)
            num_tokens = min(sequence.num_uncomputed, budget)
            self._plan_row(plan, sequence, num_tokens)
            budget -= num_tokens

    def _admit(self, plan: StepPlan, sequence: Sequence, cached: list[list[int]]) -> None:
        self.stats.restored_tokens += self.blocks.enter(sequence, cached) * self._block_size
        if sequence.num_cached is None and not sequence.request.output_token_ids:
            sequence.num_cached = sequence.num_computed
            self.stats.cached_tokens += sequence.num_computed
            self.stats.prompt_tokens += sequence.num_prompt
            self.stats.admitted += 1
            self.stats.queue_time_s += time.monotonic() - sequence.arrived_at
        self._turns.charge(sequence, num_prompt=sequence.num_uncomputed)
        sequence.row = self._free_rows.pop()
        insort(self.running, sequence, key=_order)
        plan.new_rows.append(
            NewRow(
                row=sequence.row,
                token_ids=list(sequence.token_ids),
                num_prompt_tokens=sequence.num_prompt,
                block_tables=[list(table) for table in sequence.block_tables],
                params=sequence.request.params,
                seed=sequence.request.seed,
            )
        )

    def _plan_row(self, plan: StepPlan, sequence: Sequence, num_tokens: int) -> None:
        """Add a row to the plan and advance the sequence as if the step had run."""
        num_held = len(sequence.block_tables[0])
        new_blocks = self.blocks.extend(sequence, self.blocks.num_new(sequence, num_tokens))
        start = sequence.num_computed
        num_sampled = int(start + num_tokens == sequence.num_tokens)
        plan.scheduled.append(
            ScheduledRow(
                request_id=sequence.id,
                row=sequence.row,
                start=start,
                num_tokens=num_tokens,
                num_held_blocks=num_held,
                new_blocks=new_blocks,
                num_sampled=num_sampled,
            )
        )
        sequence.num_computed += num_tokens
        sequence.num_pending += num_sampled
        self.blocks.publish(sequence)

    def update(self, step: Step, result: StepResult) -> list[TokenDelta]:
        """Take in what a step has brought. Requests gone meanwhile are skipped.

        Steps are taken in in the order in which they were scheduled.
        """
        deltas = []
        for i, (sequence, tokens) in enumerate(zip(step.sampling, result.token_ids, strict=True)):
            if self.sequences.get(sequence.id) is not sequence:
                continue
            sequence.num_pending -= 1
            if i in result.errors:
                self._remove(sequence)
                deltas.append(TokenDelta.failed(sequence.id, result.errors[i]))
                continue
            delta = self._take_in(
                sequence, tokens, result.logprobs.get(i), result.prompt_logprobs.get(i)
            )
            if i in result.vectors:
                delta = replace(delta, vector=result.vectors[i])
            if delta.finish_reason is not None:
                self._remove(sequence)
            deltas.append(delta)
            self.stats.output_tokens += len(delta.token_ids)
            self._turns.charge(sequence, num_output=len(delta.token_ids))
        return deltas

    def _take_in(
        self,
        sequence: Sequence,
        tokens: list[int],
        logprobs: list[TokenLogprobs] | None,
        prompt_logprobs: list[TokenLogprobs] | None,
    ) -> TokenDelta:
        """Append a row's tokens, up to one that ends the request."""
        ending: tuple[str | None, int | None] = (None, None)
        num_taken = 0
        while num_taken < len(tokens) and ending[0] is None:
            sequence.token_ids.append(tokens[num_taken])
            ending = self._ending(sequence, tokens[num_taken])
            num_taken += 1
        self.blocks.publish(sequence)
        return TokenDelta(
            request_id=sequence.id,
            token_ids=tokens[:num_taken],
            finish_reason=ending[0],
            stop_token=ending[1],
            num_cached_tokens=sequence.num_cached or 0,
            logprobs=None if logprobs is None else logprobs[:num_taken],
            prompt_logprobs=prompt_logprobs,
        )

    def _ending(self, sequence: Sequence, token: int) -> tuple[str | None, int | None]:
        """(finish reason, stop token) if this token, its last, ends the request."""
        params = sequence.request.params
        if token in params.stop_token_ids:
            return "stop", token
        if token in self._eos_token_ids and not params.ignore_eos:
            return "stop", None
        if len(sequence.token_ids) >= sequence.max_len:
            return "length", None
        return None, None

    def _remove(self, sequence: Sequence) -> None:
        del self.sequences[sequence.id]
        if sequence.row >= 0:
            self._release(sequence)
        else:
            self.waiting.remove(sequence)
            self._turns.leave(sequence.request.flow)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.release(sequence)
        self._free_rows.append(sequence.row)
        sequence.row = -1

    def assert_invariants(self) -> None:
        """Assert every invariant of the blocks. For tests."""
        self.blocks.assert_invariants(list(self.sequences.values()))


def _order(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order
