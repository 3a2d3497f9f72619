"""Random sequences of operations on scheduler and block pool, with every invariant checked.

The steps run on a `FakeDevice`, up to three in flight, in the order in which they were scheduled.
Pools are tiny, so that requests are preempted all the time, and prompts are drawn from so small a
vocabulary that they share prefixes all the time.
"""

import random
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
)

from engine.config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.schedule.block_pool import BlockHasher
from engine.schedule.block_tables import BlockTables, CacheGroup
from engine.schedule.request import Request, RequestLimits
from engine.schedule.scheduler import Scheduler, Step
from engine.schedule.sequence import Sequence
from tests.engine.fake_device import FakeDevice, continuation

VOCAB_SIZE = 8
EOS = 7
MAX_MODEL_LEN = 40


@dataclass
class Expected:
    """What a request must bring: these tokens, the last of them with this reason."""

    token_ids: list[int]
    finish_reason: str


@dataclass
class Spec:
    """What is asked for; few different tokens, so that many prompts begin alike."""

    prompt: list[int]
    max_tokens: int | None
    ignore_eos: bool
    salt: str
    owner: str
    num_resumed: int  # output tokens it brings along
    priority: int


REQUEST = st.builds(
    Spec,
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=24),
    max_tokens=st.one_of(st.none(), st.integers(1, 12)),
    ignore_eos=st.booleans(),
    salt=st.sampled_from(["", "", "salt"]),
    owner=st.sampled_from(["", "", "owner"]),
    num_resumed=st.sampled_from([0, 0, 0, 1, 3]),
    priority=st.integers(-1, 1),
)


class Drafts:
    """Speculation that is right as often as it is told to be."""

    def __init__(self, honesty: float) -> None:
        self._honesty = honesty
        self._rng = random.Random(honesty)

    def propose(self, sequences: list[Sequence], budget: int) -> dict[Sequence, list[int]]:
        drafts = {}
        for sequence in sequences:
            room = sequence.max_len - sequence.num_tokens - 1
            count = min(self._rng.randint(0, 6), room, budget)
            if count > 0:
                assert sequence.num_uncomputed == 1 and not sequence.drafts
                budget -= count
                text = continuation(sequence.token_ids, VOCAB_SIZE, sequence.num_pending + count)
                drafts[sequence] = [
                    token if self._rng.random() < self._honesty else self._rng.randrange(VOCAB_SIZE)
                    for token in text[sequence.num_pending :]
                ]
        return drafts

    def judge(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        assert 0 <= num_accepted <= num_drafts
        event(f"drafts accepted: {'all' if num_accepted == num_drafts else 'some or none'}")

    def end(self, sequence: Sequence) -> None: ...


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.integers(1, 4),
        num_blocks=st.integers(2, 14),
        max_num_seqs=st.integers(2, 5),
        spare_budget=st.integers(0, 8),
        prefix_caching=st.sampled_from([True, True, False]),
        num_host_blocks=st.sampled_from([0, 1, 3, 12]),
        windows=st.sampled_from([[None], [None], [3], [None, 3], [None, 1, 5]]),
        max_in_flight=st.sampled_from([1, 2, 3, 3]),
        policy=st.sampled_from(["fcfs", "fair", "priority", "shortest"]),
        honesty=st.sampled_from([None, None, 0.0, 0.7, 1.0]),
        specs=st.lists(REQUEST, min_size=2, max_size=8),
    )
    def start(
        self,
        block_size: int,
        num_blocks: int,
        max_num_seqs: int,
        spare_budget: int,
        prefix_caching: bool,
        num_host_blocks: int,
        windows: list[int | None],
        max_in_flight: int,
        policy: Literal["fcfs", "fair", "priority", "shortest"],
        honesty: float | None,
        specs: list[Spec],
    ) -> None:
        config = EngineConfig(
            model="none",
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_seqs + spare_budget,
            scheduling_policy=policy,
        )
        self.config = config
        self.blocks = BlockTables(
            [CacheGroup(num_blocks, window) for window in windows],
            BlockHasher(block_size, config.block_key),
            config.max_num_batched_tokens,
            prefix_caching,
            num_host_blocks if len(windows) == 1 else 0,
        )
        self.pool = self.blocks.pools[0]
        self.pool.changes = []
        self.cached: dict[bytes, bool] = {}  # as the changes have it
        most_blocks = self.blocks.most_blocks(MAX_MODEL_LEN)
        self.limits = RequestLimits(VOCAB_SIZE, MAX_MODEL_LEN, most_blocks, block_size)
        self.scheduler = Scheduler(
            config,
            self.blocks,
            self.limits.max_len,
            frozenset([EOS]),
            None if honesty is None else Drafts(honesty),
        )
        self.device = FakeDevice(block_size, VOCAB_SIZE, windows)
        self.max_in_flight = max_in_flight
        self.in_flight: deque[tuple[Step, str]] = deque()  # with what they said when made
        self.num_requests = 0
        self.expected: dict[str, Expected] = {}
        self.received: dict[str, list[int]] = {}
        # What requests say in full, their salt and owner.
        self.texts: list[tuple[list[int], str, str]] = []
        self.endings: Counter[str] = Counter()
        self.aborted: set[str] = set()
        for spec in specs:
            self.add(spec)

    @rule(spec=REQUEST)
    def add(self, spec: Spec) -> None:
        request_id = str(self.num_requests)
        self.num_requests += 1
        prompt = spec.prompt[: self.limits.max_len - 1]
        max_len = min(self.limits.max_len, len(prompt) + (spec.max_tokens or MAX_MODEL_LEN))
        eos = [] if spec.ignore_eos else [EOS]
        output = continuation(prompt, VOCAB_SIZE, max_len - len(prompt), eos)
        resumed = output[: min(spec.num_resumed, len(output) - 1)]
        params = SamplingParams(max_tokens=spec.max_tokens, ignore_eos=spec.ignore_eos)
        request = Request(
            request_id, prompt, params, 0, spec.salt, list(resumed), spec.priority, spec.owner
        )
        self.limits.check(prompt, params, resumed)
        self.scheduler.add(request)
        self.expected[request_id] = Expected(
            output[len(resumed) :], "stop" if output[-1] in eos else "length"
        )
        self.received[request_id] = []
        self.texts.append((prompt + output, spec.salt, spec.owner))

    @rule(number=st.integers(0, 99))
    def abort(self, number: int) -> None:
        """At any time, also when it has finished already."""
        request_id = str(number % self.num_requests)
        if request_id in self.scheduler.sequences:
            self.aborted.add(request_id)
        self.scheduler.abort(request_id)
        assert request_id not in self.scheduler.sequences

    @rule(operations=st.lists(st.sampled_from(["schedule", "schedule", "retire"]), max_size=10))
    def run(self, operations: list[str]) -> None:
        for operation in operations:
            if operation == "schedule" and len(self.in_flight) < self.max_in_flight:
                self.schedule()
            elif self.in_flight:
                self.retire()
            self.blocks_and_rows_are_accounted_for()

    @rule()
    def lose_the_cache(self) -> None:
        """As for new weights: all keys and values are gone, in host memory too."""
        while self.in_flight:
            self.retire()
        self.scheduler.forget_computed()
        self.device.forget()
        assert not self.scheduler.running

    def schedule(self) -> None:
        scheduler = self.scheduler
        had_work = [
            request
            for request in scheduler.running
            if request.num_uncomputed > 0
            and request.num_tokens < request.max_len
            and not request.drafts
        ]
        queue = list(scheduler.waiting)
        preemptions = scheduler.stats.preemptions
        step = scheduler.schedule()
        if step is None:
            assert self.in_flight or not scheduler.sequences, "stuck: nothing runs, nothing will"
            return
        plan = step.plan
        self._check_plan(step)
        planned = {request.id for request in step.sequences}
        for request in had_work:
            assert request.id in planned or request in scheduler.waiting, "a request was left out"
        if scheduler.stats.preemptions == preemptions:
            assert all(request in scheduler.running for request in had_work)
            admitted = queue[: len(plan.new_rows)]
            assert [request.row for request in admitted] == [new.row for new in plan.new_rows]
            assert scheduler.waiting == queue[len(admitted) :], "not in the policy's order"
        else:
            event("preemption")
            assert not plan.new_rows, "admitted one while another was thrown out"
            assert [r for r in scheduler.waiting if r in queue] == queue, "lost its place"
        if any(not copy.to_host for copy in plan.copies):
            event("prefix restored from host memory")
        if any(any(new.block_tables) for new in plan.new_rows):
            event("prefix found")
        self.in_flight.append((step, repr(plan)))

    def _check_plan(self, step: Step) -> None:
        plan = step.plan
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        assert all(row.num_tokens > 0 for row in plan.scheduled)
        for rows in ([row.row for row in plan.scheduled], [new.row for new in plan.new_rows]):
            assert len(set(rows)) == len(rows)
        assert {new.row for new in plan.new_rows} <= {row.row for row in plan.scheduled}
        for request, row in zip(step.sequences, plan.scheduled, strict=True):
            assert request.row == row.row
            assert row.start + row.num_tokens < request.max_len, "nobody will see the token"
            known, num_drafts = request.num_tokens - row.num_sampled, len(request.drafts)
            assert row.num_sampled == num_drafts + (row.end - num_drafts == known)
            assert not num_drafts or row.num_tokens == 1 + num_drafts

    def retire(self) -> None:
        step, as_made = self.in_flight.popleft()
        assert repr(step.plan) == as_made, "a plan changed while it was in flight"
        for delta in self.scheduler.update(step, self.device.execute(step.plan)):
            assert delta.request_id not in self.aborted, "a token for an aborted request"
            assert not self.endings[delta.request_id], "a token after the ending"
            expected, received = self.expected[delta.request_id], self.received[delta.request_id]
            received += delta.token_ids
            assert received == expected.token_ids[: len(received)]
            if delta.finish_reason is not None:
                self.endings[delta.request_id] += 1
                assert received == expected.token_ids
                assert delta.finish_reason == expected.finish_reason

    @invariant()
    def blocks_and_rows_are_accounted_for(self) -> None:
        scheduler = self.scheduler
        scheduler.assert_invariants()
        self._follow_changes()
        running, waiting = scheduler.running, scheduler.waiting
        for requests in (running, waiting):
            assert requests == sorted(requests, key=lambda request: request.order)
        everyone = [request.id for request in (*running, *waiting)]
        assert sorted(everyone) == sorted(scheduler.sequences)
        rows = [request.row for request in running]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(self.config.max_num_seqs))
        for request in running:
            for table in request.block_tables:
                filled = len(table) * self.config.block_size
                assert filled - self.config.block_size < request.num_computed <= filled
        for request in waiting:
            assert request.row == -1 and not request.block_tables

    def _follow_changes(self) -> None:
        """It tells of every change of what can be found, once."""
        assert self.pool.changes is not None
        for block_hash, is_cached in self.pool.changes:
            assert self.cached.get(block_hash, False) != is_cached
            self.cached[block_hash] = is_cached
        self.pool.changes.clear()
        for block_hash, is_cached in self.cached.items():
            found = bool(self.pool.lookup([block_hash])) or block_hash in self.pool.host
            assert is_cached == found

    def teardown(self) -> None:
        """Every request that was not aborted ends, once, and leaves nothing behind."""
        if not hasattr(self, "scheduler"):
            return
        bound = 100 + sum(len(e.token_ids) + MAX_MODEL_LEN for e in self.expected.values()) * 4
        for _ in range(bound):
            if not self.scheduler.sequences and not self.in_flight:
                break
            if len(self.in_flight) < self.max_in_flight:
                self.schedule()
            if self.in_flight:
                self.retire()
            self.blocks_and_rows_are_accounted_for()
        assert not self.scheduler.sequences, "requests without an ending"
        for request_id in self.expected:
            assert self.endings[request_id] == (request_id not in self.aborted)
        assert all(pool.num_free == pool.num_blocks for pool in self.blocks.pools)
        self._check_cached_content()

    def _check_cached_content(self) -> None:
        """Blocks found under the names of a text hold that text."""
        size = self.config.block_size
        hasher = BlockHasher(size, self.config.block_key)
        for tokens, salt, owner in self.texts:
            names: list[bytes] = []
            hasher.extend(names, tokens, salt, owner)
            for i, name in enumerate(names):
                content = [tuple(tokens[: i * size + offset + 1]) for offset in range(size)]
                for group, pool in enumerate(self.blocks.pools):
                    for block in pool.lookup([name]):
                        assert self.device.content(block, group) == content
                with self.pool.host.pinned(self.pool.host.lookup([name])) as slots:
                    for slot in slots:
                        assert self.device.host_content(slot) == content


TestScheduler = SchedulerMachine.TestCase
# The same sequences every time: a test suite should not fail by chance.
TestScheduler.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, derandomize=True
)
