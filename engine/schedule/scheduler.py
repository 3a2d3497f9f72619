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
from array import array
from bisect import insort
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from itertools import compress, pairwise

from engine.config import EngineConfig
from engine.schedule.block_pool import BlockPool
from engine.schedule.block_tables import BlockTables
from engine.schedule.fair_turns import FairTurns
from engine.schedule.request import Request
from engine.schedule.sequence import Sequence
from engine.schedule.speculation import Speculation
from engine.schedule.step import NewRow, StepPlan, StepResult, TokenDelta, count_accepted
from engine.schedule.turns import Turns

# What a later turn counts for, with the policy "shortest": a prompt that is longer by n tokens is
# overtaken by n / 32 requests of its flow at most.
_AGEING_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Step:
    """A plan, and whose rows it computes: an id may have another owner when it has run."""

    plan: StepPlan
    sequences: list[Sequence]

    @property
    def sampling(self) -> list[Sequence]:
        """Who gets the tokens that it brings."""
        return list(compress(self.sequences, self.plan.num_sampled))


@dataclass
class SchedulerStats:
    """Counters since the start."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    restored_tokens: int = 0  # of all that were found cached, those from host memory
    output_tokens: int = 0
    preemptions: int = 0


class Scheduler:
    """Owns every live sequence, the rows and the blocks."""

    def __init__(
        self,
        config: EngineConfig,
        blocks: BlockTables,
        max_len: int,
        eos_token_ids: frozenset[int] = frozenset(),
        speculation: Speculation | None = None,
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
        self._num_rows, self._token_budget = config.step_size
        self._max_sampled = config.max_sampled
        self._free_rows = list(reversed(range(self._num_rows)))
        self._max_len = max_len
        self._eos_token_ids = eos_token_ids
        self.speculation = speculation

    @property
    def pool(self) -> BlockPool:
        """The first cache group's, which keeps all tokens if any group does."""
        return self.blocks.pools[0]

    def add(self, request: Request, held: tuple[object, ...] = ()) -> Sequence:
        """Queue a request that `RequestLimits.check` has passed.

        Args:
            held: what is to be kept alive as long as the request is.
        """
        if request.id in self.sequences:
            raise ValueError(f"a request with id {request.id!r} is already live")
        max_len = request.params.longest(len(request.prompt_token_ids), self._max_len)
        num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        if num_tokens >= max_len:
            raise ValueError(f"request {request.id!r} has all its {max_len} tokens already")
        stops = request.params.end_tokens(self._eos_token_ids)
        turn = self._turns.take(request.flow)
        sequence = Sequence(request, max_len, stops, turn, self._rank(request, turn), held)
        self.sequences[request.id] = sequence
        self._wait(sequence)
        return sequence

    def _rank(self, request: Request, turn: int) -> tuple[int, int, int]:
        """The request's place by the policy: what is least goes first, and it never changes."""
        self._num_arrivals += 1
        if self._policy == "priority":
            return request.priority, turn, self._num_arrivals
        if self._policy == "shortest":
            num_tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
            return num_tokens + turn * _AGEING_TOKENS, turn, self._num_arrivals
        return 0, turn, self._num_arrivals

    def _wait(self, sequence: Sequence) -> None:
        sequence.waits_since = time.monotonic()
        insort(self.waiting, sequence, key=_order)
        self._turns.wait(sequence.request.flow)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown ids are ignored, for it may just have finished."""
        sequence = self.sequences.get(request_id)
        if sequence is not None:
            self._remove(sequence)

    def schedule(self) -> Step | None:
        """Plan one step; None when nothing can run before a result arrives.

        Rows that compute few tokens come first: attention has a kernel of its own for them.
        """
        if self.waiting and (self._lacks_blocks or not self._free_rows):
            self._make_way()
        step = Step(StepPlan(), [])
        preemptions = self.stats.preemptions
        budget = self._schedule_running(step, self._token_budget)
        if self.stats.preemptions == preemptions:
            self._schedule_waiting(step, budget)
        if not step.sequences:
            return None
        step.plan.copies.extend(self.blocks.take_copies())
        lengths = step.plan.lengths
        if step.plan.num_tokens > len(lengths) and any(n < m for m, n in pairwise(lengths)):
            order = sorted(range(len(lengths)), key=lengths.__getitem__)
            step.plan.put_in_order(order)
            step.sequences[:] = [step.sequences[i] for i in order]
        return step

    def _make_way(self) -> None:
        """Preempt a row of who has more than is due, for who waits and has fewer."""
        victim = self._turns.victim(self._turns.first(self.waiting), self.running)
        if victim is not None:
            self._preempt(victim)

    def _schedule_running(self, step: Step, budget: int) -> int:
        """Returns the budget that is left.

        The budget is at least the number of rows, and a token of it is kept for every row yet to
        come, so none starves. Most rows go on by a token within a block that they hold: nothing
        that they need can be lacking, so they come last, and all together.
        """
        block_size = self._block_size
        easy: list[Sequence] = []
        others: list[Sequence] = []
        for sequence in self.running:
            num_computed, num_tokens = sequence.num_computed, sequence.num_tokens
            if num_tokens == num_computed or num_tokens >= sequence.max_len:
                continue  # its last token is being sampled
            if sequence.drafts:
                continue  # how far it has come is known when they have been judged
            if num_tokens == num_computed + 1 and num_computed % block_size:
                easy.append(sequence)
            else:
                others.append(sequence)
        num_left = len(easy) + len(others)
        drafts: dict[Sequence, list[int]] = {}
        if self.speculation is not None:
            ready = [*easy, *(sequence for sequence in others if sequence.num_uncomputed == 1)]
            num_rows = min(self._num_rows, len(self.running) + len(self.waiting))
            most = min(budget - num_left, self._max_sampled - num_rows)
            drafts = self.speculation.propose(ready, most)
        if drafts:
            easy = [sequence for sequence in easy if sequence not in drafts]
            others = sorted({*others, *drafts}, key=_order)
        preemptions = self.stats.preemptions
        for sequence in others:
            num_left -= 1
            if sequence.row < 0:
                continue  # preempted for one before it
            num_tokens = min(sequence.num_uncomputed, budget - num_left)
            drafted = drafts.get(sequence, [])[: budget - num_left - num_tokens]
            if self.blocks.num_new(sequence, num_tokens + len(drafted)) > self._spare(num_left):
                drafted = []
            if self._make_room(sequence, num_tokens):
                self._plan_row(step, sequence, num_tokens, drafted)
                budget -= num_tokens + len(drafted)
        if self.stats.preemptions != preemptions:
            easy = [sequence for sequence in easy if sequence.row >= 0]
        self._plan_easy(step, easy)
        return budget - len(easy)

    def _spare(self, num_rows: int) -> int:
        """Blocks for drafts, which preempt nobody: a block is left for every row yet to come."""
        return min(pool.num_free for pool in self.blocks.pools) - num_rows

    def _plan_easy(self, step: Step, sequences: list[Sequence]) -> None:
        """As `_plan_row`, for rows that sample a token and need no block for it."""
        plan, ones = step.plan, array("i", [1]) * len(sequences)
        step.sequences.extend(sequences)
        plan.rows.extend([sequence.row for sequence in sequences])
        plan.starts.extend([sequence.num_computed for sequence in sequences])
        plan.lengths.extend(ones)
        plan.num_sampled.extend(ones)
        block_size = self._block_size
        for sequence in sequences:
            sequence.num_tokens += 1
            sequence.num_computed = num_computed = sequence.num_computed + 1
            if not num_computed % block_size:
                self.blocks.publish(sequence)

    def _make_room(self, sequence: Sequence, num_tokens: int) -> bool:
        """Preempt the last in order until the next tokens of a running sequence have blocks.

        Victims are later in the running list than `sequence`, or easy, so none is in the plan yet.
        False when the sequence itself had to go.
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

    def forget_computed(self) -> None:
        """All keys and values are void: whoever runs begins anew. No step may be in flight."""
        for sequence in list(self.running):
            self._preempt(sequence)
        self.blocks.forget_cached()

    def _schedule_waiting(self, step: Step, budget: int) -> None:
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
            self._admit(step.plan, sequence, cached)
            num_tokens = min(sequence.num_uncomputed, budget)
            self._plan_row(step, sequence, num_tokens)
            budget -= num_tokens

    def _admit(self, plan: StepPlan, sequence: Sequence, cached: list[list[int]]) -> None:
        self.stats.restored_tokens += self.blocks.enter(sequence, cached) * self._block_size
        if sequence.num_cached is None and not sequence.request.output_token_ids:
            sequence.num_cached = sequence.num_computed
            self.stats.cached_tokens += sequence.num_computed
            self.stats.prompt_tokens += sequence.num_prompt
        sequence.waits.append(time.monotonic() - sequence.waits_since)
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

    def _plan_row(
        self, step: Step, sequence: Sequence, num_tokens: int, drafts: Listed[int] = ()
    ) -> None:
        """Add a row to the plan and advance the sequence as if the step had run.

        Drafts are computed as if they were its next tokens, and after each of them one is sampled.
        """
        plan, start = step.plan, sequence.num_computed
        num_sampled = int(start + num_tokens == sequence.num_tokens) + len(drafts)
        num_tokens += len(drafts)
        plan.new_blocks.extend(self.blocks.extend(sequence, num_tokens))
        step.sequences.append(sequence)
        plan.add(sequence.row, start, num_tokens, num_sampled, drafts)
        sequence.drafts = drafts
        sequence.num_computed += num_tokens
        sequence.num_tokens += num_sampled
        self.blocks.publish(sequence)

    def update(self, step: Step, result: StepResult) -> list[TokenDelta]:
        """Take in what a step has brought. Requests gone meanwhile are skipped.

        Steps are taken in in the order in which they were scheduled.
        """
        deltas = []
        errors, counts_tokens = result.errors, self._turns.counts_tokens
        has_more = result.logprobs or result.prompt_logprobs or result.vectors
        for i, (sequence, tokens) in enumerate(zip(step.sampling, result.token_ids, strict=True)):
            if not sequence.is_live:
                continue
            if i in errors:
                self._remove(sequence)
                deltas.append(TokenDelta.failed(sequence.id, errors[i]))
                continue
            delta = self._take_in(sequence, tokens)
            deltas.append(delta)
            if has_more:
                delta.take_from(result, i)
            if counts_tokens:
                self._turns.charge(sequence, num_output=len(delta.token_ids))
        self.stats.output_tokens += sum([len(delta.token_ids) for delta in deltas])
        return deltas

    def _take_in(self, sequence: Sequence, tokens: list[int]) -> TokenDelta:
        """Append a row's tokens, up to one that ends the request."""
        if sequence.drafts and len(tokens) > 1:  # the step before theirs brings one
            tokens = self._judge(sequence, tokens)
        token_ids, stops, max_len = sequence.token_ids, sequence.stop_tokens, sequence.max_len
        num_before = len(token_ids)
        delta = TokenDelta(sequence.id, tokens, sequence.num_cached or 0)
        delta.num_predicted = sequence.num_predicted
        if sequence.waits:
            delta.waits, sequence.waits = sequence.waits, []
        for token in tokens:
            token_ids.append(token)
            if token in stops or len(token_ids) >= max_len:
                delta.token_ids = tokens[: len(token_ids) - num_before]
                delta.finish_reason = "stop" if token in stops else "length"
                if token in sequence.request.params.stop_token_ids:
                    delta.stop_token = token
                break
        sequence.num_tokens += len(delta.token_ids) - 1  # one was expected
        if len(token_ids) // self._block_size > sequence.num_published:
            self.blocks.publish(sequence)
        if delta.finish_reason is not None:
            delta.num_drafted = (sequence.num_drafted, sequence.num_accepted)
            self._remove(sequence)
        return delta

    def _judge(self, sequence: Sequence, sampled: list[int]) -> list[int]:
        """The tokens that hold of those sampled after its drafts; of the other drafts no trace."""
        drafts, sequence.drafts = sequence.drafts, ()
        num_accepted = count_accepted(drafts, sampled)
        num_rejected = len(drafts) - num_accepted
        sequence.num_tokens -= len(drafts)
        sequence.num_drafted += len(drafts)
        sequence.num_accepted += num_accepted
        if sequence.row >= 0 and num_rejected:
            sequence.num_computed -= num_rejected
            self.blocks.cut(sequence)
        if self.speculation is not None:
            self.speculation.judge(sequence, len(drafts), num_accepted)
        return sampled[: num_accepted + 1]

    def _remove(self, sequence: Sequence) -> None:
        del self.sequences[sequence.id]
        sequence.is_live = False
        if self.speculation is not None:
            self.speculation.end(sequence)
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
