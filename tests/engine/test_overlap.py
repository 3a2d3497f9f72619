"""Steps that overlap with scheduling: the same text, no idle device, nothing left behind."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig
from engine.engine import Engine
from engine.llm import LLM
from engine.runner import executor as executor_module
from engine.sampling_params import SamplingParams
from engine.schedule.block_tables import CacheGroup
from engine.schedule.request import Request
from engine.schedule.step import StepPlan, StepResult
from tests.conftest import CheckpointFactory
from tests.engine.fake_device import FakeDevice, continuation
from tests.engine.helpers import new_engine, new_requests, run, tokens_of
from tests.engine.oracle import random_prompts

VOCAB_SIZE = 8
EOS = 7
MAX_MODEL_LEN = 40


class FakeRunner:
    """A device that computes when its result is asked for, and not before: as late as can be."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.num_blocks is not None
        self.config = config.on_device("cpu", 0)
        self.vocab_size, self.max_len, self.max_drafts = VOCAB_SIZE, MAX_MODEL_LEN, 0
        self.num_blocks, self.num_labels = [config.num_blocks], None
        self.cache_layout = SimpleNamespace(cache_groups=lambda n: [CacheGroup(n[0])])
        num_slots = config.host_cache_memory_bytes  # of one byte each
        self.host_cache = SimpleNamespace(num_slots=num_slots) if num_slots else None
        self.eos_token_ids = frozenset([EOS])
        self.sampler = SimpleNamespace(matchers=None)  # nobody asks for a grammar
        self.forward_pass = SimpleNamespace(num_recordings=0)
        self._device = FakeDevice(config.block_size, VOCAB_SIZE)
        self._launched: deque[tuple[StepPlan, list[StepResult]]] = deque()

    def launch(self, plan: StepPlan) -> "FakePending":
        self._launched.append((plan, result := []))
        return FakePending(self, result)

    def run_until(self, result: list[StepResult]) -> None:
        while not result:
            plan, next_result = self._launched.popleft()
            next_result.append(self._device.execute(plan))


class FakePending:
    def __init__(self, runner: FakeRunner, result: list[StepResult]) -> None:
        self._runner, self._result = runner, result

    def result(self) -> StepResult:
        self._runner.run_until(self._result)
        return self._result[0]


@contextmanager
def fake_engine(
    overlap: bool, new_runner: Callable[[EngineConfig], Any] = FakeRunner, **config: Any
) -> Iterator[Engine]:
    """An engine whose device is fake: as a GPU if steps overlap, else as a CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor_module, "load_runner", lambda config, *_: new_runner(config))
        device = torch.device("cuda" if overlap else "cpu")
        patch.setattr(executor_module, "select_device", lambda _: device)
        yield Engine(EngineConfig(model="none", **config))


# --- The same text ----------------------------------------------------------------------------


@dataclass
class Arrival:
    step: int  # before which it comes
    prompt: list[int]
    max_tokens: int
    ignore_eos: bool
    stop_tokens: list[int]
    abort_after: int | None  # tokens received; as a client that has seen its stop string


ARRIVAL = st.builds(
    Arrival,
    step=st.integers(0, 12),
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
    max_tokens=st.integers(1, 12),
    ignore_eos=st.booleans(),
    stop_tokens=st.lists(st.integers(0, 5), max_size=2),
    abort_after=st.one_of(st.none(), st.integers(0, 6)),
)


def expected_text(arrival: Arrival, max_len: int) -> list[int]:
    eos = [*arrival.stop_tokens, *([] if arrival.ignore_eos else [EOS])]
    num_tokens = min(arrival.max_tokens, max_len - len(arrival.prompt))
    return continuation(arrival.prompt, VOCAB_SIZE, num_tokens, eos)


def history(engine: Engine, arrivals: list[Arrival]) -> list[list[int]]:
    """Run it all; what each client received. Every step checks the pool."""
    received: list[list[int]] = [[] for _ in arrivals]
    ended = [False] * len(arrivals)
    pool = engine.scheduler.pool
    for step in range(1000):
        for i, arrival in enumerate(arrivals):
            if arrival.step == step:
                params = SamplingParams(
                    max_tokens=arrival.max_tokens,
                    ignore_eos=arrival.ignore_eos,
                    stop_token_ids=arrival.stop_tokens,
                )
                engine.add(Request(str(i), arrival.prompt, params, 0))
        for delta in engine.step():
            i = int(delta.request_id)
            assert not ended[i], "a token after the ending"
            received[i] += delta.token_ids
            ended[i] = delta.finish_reason is not None
        for i, arrival in enumerate(arrivals):
            if arrival.abort_after is None or arrival.step > step or ended[i]:
                continue
            if len(received[i]) >= arrival.abort_after:
                engine.abort(str(i))
                ended[i] = True
        engine.scheduler.assert_invariants()
        if step > 12 and not engine.has_work:
            break
    assert all(ended)
    pool.assert_invariants([])
    assert pool.num_free == pool.num_blocks
    return received


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    arrivals=st.lists(ARRIVAL, min_size=1, max_size=8),
    block_size=st.integers(1, 4),
    num_blocks=st.integers(24, 40),
    max_num_seqs=st.integers(2, 5),
    prefix_caching=st.booleans(),
    num_host_blocks=st.sampled_from([0, 3, 30]),
)
def test_same_text_with_aborts_and_stops_at_every_step(
    arrivals: list[Arrival],
    block_size: int,
    num_blocks: int,
    max_num_seqs: int,
    prefix_caching: bool,
    num_host_blocks: int,
) -> None:
    """The fake model is a pure function of the text, so the right answer is known."""
    config = dict(
        block_size=block_size,
        num_blocks=num_blocks,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + 4,
        enable_prefix_caching=prefix_caching,
        host_cache_memory_bytes=num_host_blocks * prefix_caching,
    )
    counts = []
    for overlap in (False, True):
        with fake_engine(overlap, **config) as engine:
            received = history(engine, arrivals)
            assert engine.executor.max_in_flight == 1 + overlap
            counts.append(engine.scheduler.stats.output_tokens)
            event(f"preempted: {engine.scheduler.stats.preemptions > 0}")
            for arrival, tokens in zip(arrivals, received, strict=True):
                text = expected_text(arrival, engine.limits.max_len)
                if arrival.abort_after is None:
                    assert tokens == text
                else:
                    assert tokens == text[: max(arrival.abort_after, len(tokens))]
            assert counts[-1] == sum(map(len, received))


STOPS: dict[str, dict[str, Any]] = {
    "eos": dict(max_tokens=40),
    "max_tokens": dict(max_tokens=24, ignore_eos=True),
    "stop token": dict(max_tokens=40, ignore_eos=True, stop_token_ids=list(range(5, 320, 9))),
    "penalties": dict(
        max_tokens=20, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2
    ),
    "rules": dict(max_tokens=20, min_tokens=7, logit_bias={9: 2.0}, bad_words_token_ids=[[4, 5]]),
}
POOLS: dict[str, dict[str, Any]] = {
    "roomy": dict(),
    "tiny pool": dict(block_size=4, num_blocks=26, max_num_seqs=16, max_num_batched_tokens=24),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("stop", STOPS)
def test_a_real_model_says_the_same(checkpoints: CheckpointFactory, stop: str, pool: str) -> None:
    outputs = []
    for overlap in (False, True):
        directory = checkpoints("qwen3")
        with new_engine(directory, async_scheduling=overlap, **POOLS[pool]) as engine:
            requests = new_requests(random_prompts(20, 50), temperature=1.0, **STOPS[stop])
            outputs.append(run(engine, requests))
            stats = engine.scheduler.stats
            if stop == "max_tokens":  # the others may end before it comes to that
                assert (stats.preemptions > 0) == (pool == "tiny pool")
            # What was computed past an ending counts for nothing.
            assert stats.output_tokens == sum(len(output.token_ids) for output in outputs[-1])
    for one, other in zip(*outputs, strict=True):
        assert (one.token_ids, one.finish_reason, one.stop_token) == (
            other.token_ids,
            other.finish_reason,
            other.stop_token,
        )


def test_stop_strings_end_the_same_text() -> None:
    """They are found outside of the engine, a step late, and end in an abort."""
    results = []
    for overlap in (False, True):
        llm = LLM(
            "manta-demo",
            num_threads=1,
            num_blocks=64,
            max_model_len=256,
            device="cpu",
            async_scheduling=overlap,
        )
        params = SamplingParams(temperature=0.9, seed=3, max_tokens=40, stop=["e", "th", "\n"], n=3)
        outputs = llm.generate(["Once upon a time", "1, 2, 3"], params, use_tqdm=False)
        results.append([[(o.text, o.token_ids, o.stop_reason) for o in r.outputs] for r in outputs])
        assert llm.engine.scheduler.pool.num_free == 64
        llm.close()
    assert results[0] == results[1]
    assert any(stop in ("e", "th", "\n") for choices in results[0] for _, _, stop in choices)


# --- No idle device ---------------------------------------------------------------------------


class Clock:
    """What host and device would do in time. Steps take 5 units, planning and launching 1 each."""

    def __init__(self) -> None:
        self.host = self.busy_until = self.idle = 0.0

    def launch(self) -> float:
        """The device starts when it is free and told to; returns when the step will end."""
        self.host += 2
        if self.busy_until:
            self.idle += max(self.host - self.busy_until, 0)
        self.busy_until = max(self.host, self.busy_until) + 5
        return self.busy_until


class TimedRunner(FakeRunner):
    clock: Clock

    def launch(self, plan: StepPlan) -> "TimedPending":
        ends = self.clock.launch()
        self._launched.append((plan, result := []))
        return TimedPending(self, result, ends)


class TimedPending(FakePending):
    def __init__(self, runner: TimedRunner, result: list[StepResult], ends: float) -> None:
        super().__init__(runner, result)
        self._clock, self._ends = runner.clock, ends

    def result(self) -> StepResult:
        self._clock.host = max(self._clock.host, self._ends)
        return super().result()


@pytest.mark.parametrize("overlap", [False, True])
def test_the_device_never_waits_for_the_host_between_steps(overlap: bool) -> None:
    TimedRunner.clock = clock = Clock()
    with fake_engine(overlap, TimedRunner, num_blocks=64, block_size=4, max_num_seqs=4) as engine:
        prompts = [[0], [1], [0, 1]]
        requests = new_requests(prompts, max_tokens=20, ignore_eos=True)
        outputs = tokens_of(run(engine, requests))
        assert engine.num_steps == 20, "nothing is computed in vain when the length is known"
    assert outputs == [continuation(prompt, VOCAB_SIZE, 20) for prompt in prompts]
    assert clock.idle == (0 if overlap else 19 * 2)
    assert clock.busy_until == 2 + 20 * 5 + clock.idle
