"""What the scheduler decides, case by case."""

from typing import Any

import pytest

from engine.config import EngineConfig
from engine.sampling_params import SamplingParams
from engine.schedule.block_pool import BlockHasher
from engine.schedule.block_tables import BlockTables, CacheGroup
from engine.schedule.request import Request, RequestLimits
from engine.schedule.scheduler import Scheduler, Step
from engine.schedule.sequence import Sequence
from engine.schedule.step import StepResult, TokenDelta

EOS = 99


def new_scheduler(
    num_blocks: int = 100, prefix_caching: bool = True, max_model_len: int = 1000, **config: Any
) -> Scheduler:
    """Blocks of 4 tokens, 8 rows and 64 tokens per step, unless `config` says otherwise."""
    defaults = dict(model="none", block_size=4, max_num_seqs=8, max_num_batched_tokens=64)
    engine_config = EngineConfig(**defaults | config)
    hasher = BlockHasher(engine_config.block_size, b"of this test")
    budget = engine_config.max_num_batched_tokens
    blocks = BlockTables([CacheGroup(num_blocks)], hasher, budget, prefix_caching)
    max_len = min(max_model_len, num_blocks * engine_config.block_size)
    return Scheduler(engine_config, blocks, max_len, frozenset([EOS]))


def add(
    scheduler: Scheduler,
    request_id: str,
    prompt: int | list[int],
    salt: str = "",
    output: tuple[int, ...] = (),
    priority: int = 0,
    owner: str = "",
    flow: str = "",
    **params: Any,
) -> Sequence:
    """Queue a request; a prompt given as a length is of tokens that no other prompt has."""
    if isinstance(prompt, int):
        prompt = [1000 * ord(request_id) + i for i in range(prompt)]
    sampling = SamplingParams(**{"max_tokens": None} | params)
    request = Request(
        request_id, prompt, sampling, 0, salt, list(output), priority, owner, flow=flow
    )
    return scheduler.add(request)


def planned(step: Step | None) -> dict[str, tuple[int, int, bool]]:
    """{request id: (start, number of tokens, whether it samples)}"""
    assert step is not None
    return {
        sequence.id: (row.start, row.num_tokens, row.num_sampled == 1)
        for sequence, row in zip(step.sequences, step.plan.scheduled, strict=True)
    }


def retire(scheduler: Scheduler, step: Step | None, *tokens: int) -> list[TokenDelta]:
    """The step has run, and each row that samples has brought these tokens."""
    assert step is not None
    sampled = [list(tokens or (7,)) for _ in step.sampling]
    deltas = scheduler.update(step, StepResult(sampled))
    scheduler.assert_invariants()
    return deltas


def step(scheduler: Scheduler, token: int = 7) -> dict[str, tuple[int, int, bool]]:
    scheduled = scheduler.schedule()
    retire(scheduler, scheduled, token)
    return planned(scheduled)


# --- The token budget -------------------------------------------------------------------------


def test_an_idle_scheduler_has_no_plan() -> None:
    assert new_scheduler().schedule() is None


def test_a_prompt_is_computed_whole_and_then_token_by_token() -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", 10)
    assert step(scheduler) == {"a": (0, 10, True)}
    assert step(scheduler) == {"a": (10, 1, True)}
    assert step(scheduler) == {"a": (11, 1, True)}


def test_a_long_prompt_is_computed_in_chunks_and_only_the_last_samples() -> None:
    scheduler = new_scheduler(max_num_batched_tokens=8)
    add(scheduler, "a", 20)
    assert step(scheduler) == {"a": (0, 8, False)}
    assert step(scheduler) == {"a": (8, 8, False)}
    assert step(scheduler) == {"a": (16, 4, True)}
    assert step(scheduler) == {"a": (20, 1, True)}


def test_running_requests_come_before_waiting_ones() -> None:
    """A long prompt gets what is left of the budget and does not hold up the others."""
    scheduler = new_scheduler(max_num_batched_tokens=8)
    add(scheduler, "a", 3)
    step(scheduler)
    add(scheduler, "b", 20)
    assert step(scheduler) == {"a": (3, 1, True), "b": (0, 7, False)}
    assert step(scheduler) == {"a": (4, 1, True), "b": (7, 7, False)}
    assert step(scheduler) == {"a": (5, 1, True), "b": (14, 6, True)}


def test_several_prompts_share_a_step_in_order_of_arrival() -> None:
    scheduler = new_scheduler(max_num_batched_tokens=12)
    for request_id in ("a", "b", "c"):
        add(scheduler, request_id, 5)
    assert step(scheduler) == {"a": (0, 5, True), "b": (0, 5, True), "c": (0, 2, False)}


def test_no_more_requests_run_than_there_are_rows() -> None:
    scheduler = new_scheduler(max_num_seqs=2)
    for request_id in ("a", "b", "c"):
        add(scheduler, request_id, 5)
    assert set(step(scheduler)) == {"a", "b"}
    scheduler.abort("a")
    assert set(step(scheduler)) == {"b", "c"}


def test_a_row_is_announced_with_all_that_the_device_must_know() -> None:
    scheduler = new_scheduler()
    request = add(scheduler, "a", [1, 2, 3], output=(4,), temperature=0.5)
    scheduled = scheduler.schedule()
    assert scheduled is not None
    (new,) = scheduled.plan.new_rows
    assert (new.token_ids, new.num_prompt_tokens) == ([1, 2, 3, 4], 3)
    assert (new.params, new.seed, new.block_tables) == (request.request.params, 0, [[]])
    assert scheduled.plan.scheduled[0].row == new.row


# --- Steps in flight --------------------------------------------------------------------------


def test_the_next_step_is_planned_before_the_token_is_known() -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", 4)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert planned(first) == {"a": (0, 4, True)}
    assert planned(second) == {"a": (4, 1, True)}
    assert [delta.token_ids for delta in retire(scheduler, first, 5)] == [[5]]
    assert [delta.token_ids for delta in retire(scheduler, second, 6)] == [[6]]


def test_a_step_may_bring_a_row_several_tokens() -> None:
    """What is not computed of them is caught up with, as with any other tokens."""
    scheduler = new_scheduler()
    request = add(scheduler, "a", 4)
    (delta,) = retire(scheduler, scheduler.schedule(), 5, 6, 8)
    assert delta.token_ids == request.output_token_ids == [5, 6, 8]
    assert step(scheduler) == {"a": (4, 3, True)}
    assert step(scheduler) == {"a": (7, 1, True)}
    assert scheduler.stats.output_tokens == 5


@pytest.mark.parametrize(
    "tokens, kept, reason, params",
    [
        ((5, EOS, 8), [5, EOS], "stop", {}),
        ((5, 6, 8), [5, 6], "length", dict(max_tokens=2)),
        ((5, 6, 8), [5, 6], "stop", dict(stop_token_ids=[6])),
    ],
)
def test_what_a_step_brings_after_an_ending_is_dropped(
    tokens: tuple[int, ...], kept: list[int], reason: str, params: dict[str, Any]
) -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", 4, **params)
    (delta,) = retire(scheduler, scheduler.schedule(), *tokens)
    assert (delta.token_ids, delta.finish_reason) == (kept, reason)
    assert not scheduler.sequences and scheduler.pool.num_free == scheduler.pool.num_blocks


def test_nothing_is_planned_past_the_last_token() -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", 4, max_tokens=2)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.schedule() is None
    retire(scheduler, first)
    assert scheduler.schedule() is None
    (delta,) = retire(scheduler, second)
    assert delta.finish_reason == "length"
    assert scheduler.pool.num_free == 100


def test_what_ran_after_the_ending_is_dropped() -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", 4)
    first, second = scheduler.schedule(), scheduler.schedule()
    (delta,) = retire(scheduler, first, EOS)
    assert delta.finish_reason == "stop"
    assert retire(scheduler, second) == []


def test_an_aborted_request_is_forgotten_at_once_and_its_tokens_dropped() -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", 4)
    add(scheduler, "b", 4)
    scheduled = scheduler.schedule()
    scheduler.abort("a")
    scheduler.abort("a")
    scheduler.abort("never there")
    assert scheduler.pool.num_free == 99
    assert [delta.request_id for delta in retire(scheduler, scheduled)] == ["b"]


def test_a_waiting_request_can_be_aborted() -> None:
    scheduler = new_scheduler(max_num_seqs=1)
    add(scheduler, "a", 4)
    add(scheduler, "b", 4)
    step(scheduler)
    scheduler.abort("b")
    scheduler.abort("a")
    assert scheduler.schedule() is None and not scheduler.sequences


def test_a_live_id_cannot_be_used_twice() -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", 4)
    with pytest.raises(ValueError, match="'a' is already live"):
        add(scheduler, "a", 4)


def test_an_id_used_again_after_an_abort_gets_no_token_of_its_predecessor() -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", 4)
    scheduled = scheduler.schedule()
    scheduler.abort("a")
    add(scheduler, "a", 4)
    assert retire(scheduler, scheduled) == []


# --- Endings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params, token, ending",
    [
        (dict(), 7, (None, None)),
        (dict(), EOS, ("stop", None)),
        (dict(ignore_eos=True), EOS, (None, None)),
        (dict(max_tokens=1), 7, ("length", None)),
        (dict(max_tokens=1), EOS, ("stop", None)),
        (dict(stop_token_ids=[7]), 7, ("stop", 7)),
        (dict(stop_token_ids=[7], ignore_eos=True), 7, ("stop", 7)),
        (dict(stop_token_ids=[EOS], ignore_eos=True), EOS, ("stop", EOS)),
    ],
)
def test_ending(params: dict[str, Any], token: int, ending: tuple[str | None, int | None]) -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", 4, **params)
    (delta,) = retire(scheduler, scheduler.schedule(), token)
    assert (delta.token_ids, (delta.finish_reason, delta.stop_token)) == ([token], ending)
    assert (delta.finish_reason is None) == ("a" in scheduler.sequences)


def test_the_window_ends_a_request_without_max_tokens() -> None:
    scheduler = new_scheduler(max_model_len=6)
    add(scheduler, "a", 4)
    step(scheduler)
    (delta,) = retire(scheduler, scheduler.schedule())
    assert delta.finish_reason == "length"


def test_a_resumed_request_goes_on_where_it_was() -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", 4, output=(5, 6), max_tokens=3)
    scheduled = scheduler.schedule()
    assert planned(scheduled) == {"a": (0, 6, True)}
    (delta,) = retire(scheduler, scheduled)
    assert (delta.token_ids, delta.finish_reason) == ([7], "length")


def test_a_request_resumed_with_all_its_tokens_is_refused() -> None:
    scheduler = new_scheduler()
    with pytest.raises(ValueError):
        add(scheduler, "a", 4, output=(5, 6), max_tokens=2)


# --- Prefix cache -----------------------------------------------------------------------------

PROMPT = list(range(1, 13))  # three full blocks


def test_a_cached_prefix_is_not_computed_again() -> None:
    scheduler = new_scheduler()
    first = add(scheduler, "a", PROMPT)
    step(scheduler)
    add(scheduler, "b", [*PROMPT, 13, 14])
    scheduled = scheduler.schedule()
    assert planned(scheduled)["b"] == (12, 2, True)
    assert scheduled is not None
    assert scheduled.plan.new_rows[0].block_tables[0] == first.block_tables[0][:3]
    assert {d.request_id: d.num_cached_tokens for d in retire(scheduler, scheduled)} == {
        "a": 0,
        "b": 12,
    }


def test_the_last_token_of_a_cached_prompt_is_always_computed() -> None:
    """Its logits are what the first output token is drawn from."""
    scheduler = new_scheduler()
    add(scheduler, "a", PROMPT, max_tokens=1)
    step(scheduler)
    add(scheduler, "b", PROMPT)
    assert step(scheduler) == {"b": (8, 4, True)}


def test_blocks_outlive_the_request_that_computed_them() -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", PROMPT, max_tokens=1)
    step(scheduler)
    assert scheduler.pool.num_free == 100
    add(scheduler, "b", [*PROMPT, 13])
    assert step(scheduler) == {"b": (12, 1, True)}


def test_output_is_cached_too() -> None:
    """As the beginning of the next turn of a conversation."""
    scheduler = new_scheduler()
    add(scheduler, "a", [1, 2], max_tokens=7)
    for _ in range(7):
        step(scheduler)
    # The last output token was never an input; the eight tokens before it fill two blocks.
    add(scheduler, "b", [1, 2] + 7 * [7] + [3])
    assert step(scheduler) == {"b": (8, 2, True)}


def test_output_is_cached_when_its_tokens_become_known_after_the_last_plan() -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", [1, 2], max_tokens=7)
    steps = [scheduler.schedule() for _ in range(7)]
    for scheduled in steps:
        retire(scheduler, scheduled)
    add(scheduler, "b", [1, 2] + 7 * [7] + [3])
    assert step(scheduler) == {"b": (8, 2, True)}


def test_prompts_that_arrive_together_share_blocks_within_the_step() -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", PROMPT)
    add(scheduler, "b", [*PROMPT, 13])
    assert step(scheduler) == {"a": (0, 12, True), "b": (12, 1, True)}


def test_only_what_has_been_scheduled_is_found() -> None:
    scheduler = new_scheduler(max_num_batched_tokens=9)
    add(scheduler, "a", PROMPT)
    assert step(scheduler) == {"a": (0, 9, False)}
    add(scheduler, "b", PROMPT)
    assert step(scheduler) == {"a": (9, 3, True), "b": (8, 4, True)}


@pytest.mark.parametrize("salts", [("", "x"), ("x", ""), ("x", "y")])
def test_other_salts_share_nothing(salts: tuple[str, str]) -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", PROMPT, salt=salts[0])
    step(scheduler)
    add(scheduler, "b", PROMPT, salt=salts[1])
    assert step(scheduler)["b"] == (0, 12, True)


@pytest.mark.parametrize("owners", [("", "x"), ("x", ""), ("x", "y")])
def test_other_owners_share_nothing_whatever_their_salts(owners: tuple[str, str]) -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", PROMPT, owner=owners[0])
    step(scheduler)
    add(scheduler, "b", PROMPT, owner=owners[1], salt=owners[0])
    assert step(scheduler)["b"] == (0, 12, True)


def test_equal_salts_share() -> None:
    scheduler = new_scheduler()
    add(scheduler, "a", PROMPT, salt="x")
    step(scheduler)
    add(scheduler, "b", PROMPT, salt="x")
    assert step(scheduler)["b"] == (8, 4, True)


def test_without_prefix_caching_everything_is_computed() -> None:
    scheduler = new_scheduler(prefix_caching=False)
    add(scheduler, "a", PROMPT)
    step(scheduler)
    add(scheduler, "b", PROMPT)
    assert step(scheduler)["b"] == (0, 12, True)


# --- When the pool is full --------------------------------------------------------------------


def test_a_newcomer_waits_until_its_prompt_fits_beside_the_others() -> None:
    scheduler = new_scheduler(num_blocks=5)
    add(scheduler, "a", 8, max_tokens=5)
    add(scheduler, "b", 12)
    for _ in range(5):
        assert set(step(scheduler)) == {"a"}
    assert set(step(scheduler)) == {"b"}
    assert scheduler.stats.preemptions == 0


def test_who_can_grow_no_further_keeps_no_block_from_a_newcomer() -> None:
    """Three of 12 tokens at most take all nine blocks, and from the first step on."""
    scheduler = new_scheduler(num_blocks=9)
    for name in "abc":
        add(scheduler, name, 8, max_tokens=4)
    assert set(step(scheduler)) == {"a", "b", "c"}
    while scheduler.sequences:
        step(scheduler)
    assert scheduler.stats.preemptions == 0


def test_cached_blocks_that_are_free_do_not_make_a_newcomer_smaller() -> None:
    """Taking them uses up free blocks as well."""
    scheduler = new_scheduler(num_blocks=5)
    add(scheduler, "a", PROMPT, max_tokens=1)
    step(scheduler)
    add(scheduler, "b", 5)
    step(scheduler)
    add(scheduler, "c", [*PROMPT, 13])
    assert set(step(scheduler)) == {"b"}


def crowded(num_steps: int = 5) -> tuple[Scheduler, Request, Request]:
    """Two requests that fill four blocks of four tokens in 5 steps; the next needs a fifth."""
    scheduler = new_scheduler(num_blocks=4)
    a, b = add(scheduler, "a", 4), add(scheduler, "b", 3)
    for _ in range(num_steps):
        assert set(step(scheduler)) == {"a", "b"}
    return scheduler, a, b


def preempted_with_its_token_in_flight() -> tuple[Scheduler, Sequence, Step]:
    """Request b was preempted by the step after the one that is still in flight."""
    scheduler, _, b = crowded(num_steps=4)
    in_flight = scheduler.schedule()
    assert in_flight is not None
    assert set(planned(in_flight)) == {"a", "b"}
    assert set(planned(scheduler.schedule())) == {"a"}
    assert scheduler.stats.preemptions == 1
    return scheduler, b, in_flight


def test_the_latest_comer_makes_room() -> None:
    scheduler, a, b = crowded()
    assert step(scheduler) == {"a": (8, 1, True)}
    assert scheduler.stats.preemptions == 1
    assert (b.row, b.block_tables, list(scheduler.waiting)) == (-1, [], [b])
    assert a in scheduler.running


def test_a_preempted_request_comes_back_with_all_its_tokens() -> None:
    scheduler, _, b = crowded()
    step(scheduler)
    scheduler.abort("a")
    tokens = list(b.token_ids)
    scheduled = scheduler.schedule()
    assert scheduled is not None
    assert scheduled.plan.new_rows[0].token_ids == tokens
    assert scheduled.plan.new_rows[0].num_prompt_tokens == 3
    # Its first block was still in the cache.
    assert planned(scheduled) == {"b": (4, 4, True)}


def test_a_preempted_request_is_the_first_to_come_back() -> None:
    scheduler, _, b = crowded()
    c = add(scheduler, "c", 1)
    assert set(step(scheduler)) == {"a"}
    assert list(scheduler.waiting) == [b, c]


def test_a_preempted_request_waits_for_its_token_in_flight() -> None:
    """It cannot be announced to the device again before that token is known."""
    scheduler, b, in_flight = preempted_with_its_token_in_flight()
    assert b.num_pending == 1
    scheduler.abort("a")
    assert scheduler.schedule() is None
    deltas = {delta.request_id: delta for delta in retire(scheduler, in_flight, 5)}
    assert deltas["b"].token_ids == [5]
    scheduled = scheduler.schedule()
    assert scheduled is not None and scheduled.plan.new_rows[0].token_ids[-1] == 5


def test_a_request_may_end_while_it_is_preempted() -> None:
    scheduler, _, in_flight = preempted_with_its_token_in_flight()
    retire(scheduler, in_flight, EOS)
    assert not scheduler.sequences and not scheduler.waiting
    assert scheduler.pool.num_free == 4


def test_one_request_may_use_the_whole_pool() -> None:
    scheduler = new_scheduler(num_blocks=4)
    add(scheduler, "a", 4)
    for _ in range(12):
        step(scheduler)
    assert scheduler.schedule() is None and not scheduler.sequences
    assert scheduler.stats.preemptions == 0


def test_a_request_preempted_within_its_prompt_does_not_count_as_cached() -> None:
    """num_cached tells a user what others had computed; stats count each prompt once."""
    scheduler = new_scheduler(num_blocks=47, block_size=1, max_num_batched_tokens=8)
    add(scheduler, "a", 4)
    step(scheduler)
    b = add(scheduler, "b", 40)
    while not scheduler.stats.preemptions:
        step(scheduler)
    scheduler.abort("a")
    step(scheduler)
    assert b in scheduler.running
    assert b.num_cached == 0
    assert scheduler.stats.prompt_tokens == 44


# --- Policies --------------------------------------------------------------------------------


def test_priority_admits_the_smallest_first_and_equals_as_they_came() -> None:
    scheduler = new_scheduler(scheduling_policy="priority", max_num_seqs=1)
    for request_id, priority in (("a", 1), ("b", 0), ("c", -5), ("d", 0)):
        add(scheduler, request_id, 3, priority=priority, max_tokens=1)
    order = []
    while scheduler.sequences:
        order += list(step(scheduler))
    assert order == ["c", "b", "d", "a"]


def test_priority_preempts_the_least_urgent() -> None:
    """The pool is full of an urgent newcomer and an older request that can wait."""
    scheduler = new_scheduler(num_blocks=5, scheduling_policy="priority")
    old = add(scheduler, "a", 7, priority=1)
    step(scheduler)
    urgent = add(scheduler, "b", 3, priority=0)
    while not scheduler.stats.preemptions:
        step(scheduler)
    assert (scheduler.running, scheduler.waiting) == ([urgent], [old])


def test_an_urgent_long_prompt_leaves_every_running_row_its_token() -> None:
    scheduler = new_scheduler(
        scheduling_policy="priority", max_num_seqs=4, max_num_batched_tokens=10
    )
    for request_id in "ab":
        add(scheduler, request_id, 2, priority=1)
    step(scheduler)
    add(scheduler, "c", 30, priority=0)
    assert step(scheduler) == {"a": (2, 1, True), "b": (2, 1, True), "c": (0, 8, False)}
    assert step(scheduler) == {"c": (8, 8, False), "a": (3, 1, True), "b": (3, 1, True)}


def test_shortest_lets_short_prompts_pass_but_only_so_many() -> None:
    scheduler = new_scheduler(scheduling_policy="shortest", max_num_seqs=1)
    add(scheduler, "L", 100, max_tokens=1)
    for request_id in "abcde":
        add(scheduler, request_id, 4, max_tokens=1)
    order: list[str] = []
    while scheduler.sequences:
        order += [request_id for request_id in step(scheduler) if request_id not in order]
    assert order == ["a", "b", "L", "c", "d", "e"]


def test_fcfs_takes_no_notice_of_priorities() -> None:
    scheduler = new_scheduler(max_num_seqs=1)
    add(scheduler, "a", 3, max_tokens=1)
    add(scheduler, "b", 3, priority=-9, max_tokens=1)
    assert list(step(scheduler)) == ["a"]


# --- Turns -----------------------------------------------------------------------------------


def served(scheduler: Scheduler) -> list[str]:
    """Who is served, in order, up to the last; all have one token to come."""
    order = []
    while scheduler.sequences:
        order += list(step(scheduler))
    return order


@pytest.mark.parametrize("policy", ["fcfs", "priority", "shortest"])
def test_flows_take_turns(policy: str) -> None:
    scheduler = new_scheduler(scheduling_policy=policy, max_num_seqs=1)
    for request_id in "abcdef":
        add(scheduler, request_id, 3, flow="many", max_tokens=1)
    for request_id in "xy":
        add(scheduler, request_id, 3, flow="few", max_tokens=1)
    assert served(scheduler) == ["a", "b", "x", "c", "y", "d", "e", "f"]


def test_a_newcomer_waits_for_one_request_of_every_flow() -> None:
    scheduler = new_scheduler(max_num_seqs=1)
    for request_id in "abcdef":
        add(scheduler, request_id, 3, flow="many", max_tokens=1)
    first = list(step(scheduler)) + list(step(scheduler)) + list(step(scheduler))
    add(scheduler, "x", 3, flow="new", max_tokens=1)
    assert first + served(scheduler) == ["a", "b", "c", "d", "x", "e", "f"]


def test_newcomers_without_end_starve_nobody() -> None:
    """A flow of two, and as many flows of one as are served: its second is not put off for ever."""
    scheduler = new_scheduler(max_num_seqs=1)
    add(scheduler, "a", 3, flow="two", max_tokens=1)
    add(scheduler, "b", 3, flow="two", max_tokens=1)
    order: list[str] = []
    for request_id in "klmnopqrst":
        add(scheduler, request_id, 3, flow=request_id, max_tokens=1)
        order += list(step(scheduler))
    assert order[:4] == ["a", "b", "k", "l"]


@pytest.mark.parametrize("flows", ["aaaaaaaa", "abcdefgh"])
@pytest.mark.parametrize("rows", [1, 3])
def test_one_flow_or_one_each_is_first_come_first_served(flows: str, rows: int) -> None:
    scheduler = new_scheduler(max_num_seqs=rows)
    order: list[str] = []
    for request_id, flow in zip("ijklmnop", flows, strict=True):
        add(scheduler, request_id, 3, flow=flow, max_tokens=2)
        order += [name for name in step(scheduler) if name not in order]
    while scheduler.sequences:
        order += [name for name in step(scheduler) if name not in order]
    assert order == list("ijklmnop")


def test_of_flows_that_do_not_wait_nothing_is_kept() -> None:
    scheduler = new_scheduler(num_blocks=5)
    for request_id in "ab":
        add(scheduler, request_id, 7, flow=request_id)
    add(scheduler, "c", 7, flow="c")
    while not scheduler.stats.preemptions:
        step(scheduler)
    for request_id in "abc":
        scheduler.abort(request_id)
    assert vars(scheduler._turns) == {"_now": 3, "_last": {}, "_num_waiting": {}}


# --- At the door ------------------------------------------------------------------------------

LIMITS = RequestLimits(vocab_size=100, max_model_len=32, num_blocks=4, block_size=4)
WINDOW_LIMITS = RequestLimits(vocab_size=100, max_model_len=8, num_blocks=4, block_size=4)


@pytest.mark.parametrize(
    "limits, prompt, params, message",
    [
        (LIMITS, [], {}, "the prompt is empty"),
        (LIMITS, [1] * 16, {}, "16 tokens.*KV cache holds 16 tokens.*raise num_blocks"),
        (WINDOW_LIMITS, [1] * 8, {}, "8 tokens.*the context window is 8 tokens"),
        (LIMITS, [1, 100], {}, r"prompt: token id 100 is outside the vocabulary \(0 to 99\)"),
        (LIMITS, [-1], {}, "prompt: token id -1"),
        (LIMITS, [1], dict(stop_token_ids=[3, 200]), "stop_token_ids: token id 200"),
    ],
)
def test_what_could_never_run_is_refused_with_the_reason(
    limits: RequestLimits, prompt: list[int], params: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        limits.check(prompt, SamplingParams(**params))


def test_what_just_fits_is_accepted() -> None:
    LIMITS.check([1] * 15, SamplingParams())
    WINDOW_LIMITS.check([99] * 7, SamplingParams(stop_token_ids=[0]))


def test_rows_without_a_token_each_are_refused() -> None:
    with pytest.raises(ValueError, match=r"max_num_batched_tokens \(4\).*max_num_seqs \(8\)"):
        EngineConfig(model="none", max_num_batched_tokens=4, max_num_seqs=8)
