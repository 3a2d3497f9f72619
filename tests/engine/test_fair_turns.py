"""The scheduling policy "fair": tokens are shared by weight, and nobody waits behind a crowd."""

import itertools
from collections import Counter

import pytest

from engine.sampling_params import SamplingParams
from engine.schedule.request import Request
from engine.schedule.scheduler import Scheduler
from engine.schedule.step import StepResult
from tests.engine.test_scheduler import new_scheduler

_ids = map(str, itertools.count())


def ask(scheduler: Scheduler, flow: str, prompt: int, output: int, weight: float = 1.0) -> str:
    request_id = next(_ids)
    tokens = [1000 * int(request_id) + i for i in range(prompt)]
    params = SamplingParams(max_tokens=output)
    scheduler.add(Request(request_id, tokens, params, 0, flow=flow, weight=weight))
    return request_id


def run_step(scheduler: Scheduler) -> list[str]:
    """Who got a token."""
    step = scheduler.schedule()
    assert step is not None
    deltas = scheduler.update(step, StepResult([[7]] * len(step.sampling)))
    return [delta.request_id for delta in deltas]


@pytest.mark.parametrize("num_blocks", [1000, 60], ids=["rows-lack", "blocks-lack"])
def test_a_thousand_queued_requests_delay_another_client_by_a_step(num_blocks: int) -> None:
    scheduler = new_scheduler(scheduling_policy="fair", num_blocks=num_blocks)
    for _ in range(1000):
        ask(scheduler, "crowd", prompt=20, output=200)
    for _ in range(30):
        run_step(scheduler)
    for _ in range(4):
        newcomer = ask(scheduler, "newcomer", prompt=20, output=3)
        assert newcomer in [*run_step(scheduler), *run_step(scheduler)]
        for _ in range(20):
            run_step(scheduler)
        scheduler.assert_invariants()
    assert scheduler.stats.preemptions > 0


@pytest.mark.parametrize("weights", [(1, 1), (1, 3), (0.5, 0.25)])
def test_tokens_are_shared_by_weight(weights: tuple[float, float]) -> None:
    """Though one client's requests are long answers to short prompts, the other's the reverse."""
    scheduler = new_scheduler(scheduling_policy="fair", num_blocks=1000, max_num_seqs=4)
    sizes, flows = {"a": (4, 40), "b": (60, 5)}, {}
    served, seen = Counter[str](), set[str]()
    for flow, weight in zip("ab", weights, strict=True):
        for _ in range(200):
            flows[ask(scheduler, flow, *sizes[flow], weight=weight)] = flow
    for number in range(700):
        for request_id in run_step(scheduler):
            flow = flows[request_id]
            is_new = request_id not in seen
            seen.add(request_id)
            if number > 100:
                served[flow] += 2 + (sizes[flow][0] if is_new else 0)
    assert served["a"] / served["b"] == pytest.approx(weights[0] / weights[1], rel=0.15)


def test_who_has_not_asked_has_saved_up_nothing() -> None:
    scheduler = new_scheduler(scheduling_policy="fair", max_num_seqs=1)
    ask(scheduler, "rare", prompt=4, output=1)
    run_step(scheduler)
    for _ in range(200):
        ask(scheduler, "busy", prompt=4, output=1)
    for _ in range(100):
        run_step(scheduler)
    rare = {ask(scheduler, "rare", prompt=4, output=1) for _ in range(50)}
    turns = [run_step(scheduler)[0] in rare for _ in range(40)]
    assert abs(sum(turns) - 20) <= 2


def test_of_clients_that_are_gone_little_is_kept() -> None:
    scheduler = new_scheduler(scheduling_policy="fair", num_blocks=1000)
    for i in range(3000):
        ask(scheduler, f"client {i}", prompt=4, output=1)
        run_step(scheduler)
    assert len(scheduler._turns._counters) < 2000  # type: ignore[attr-defined]
