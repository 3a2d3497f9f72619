"""Ranks do what they are told, in order: steps, and commands that they have not been told of."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.ranks.group import Leader
from engine.runner.local_followers import LocalFollowers
from engine.runner.model_runner import ModelRunner
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_requests, run, tokens_of


@dataclass(frozen=True)
class Sum:
    """Shows which ranks have run it: each adds its number, and all must take part."""

    value: int

    def run(self, runner: ModelRunner) -> int:
        own = torch.tensor(self.value + runner.ranks.world.rank)
        return int(runner.ranks.world.all_reduce(own).item())


@dataclass(frozen=True)
class Fail:
    def run(self, runner: ModelRunner) -> None:
        if runner.ranks.world.rank == 0:
            raise RuntimeError("this command fails on the leader")


@contextmanager
def engine_of(
    directory: Path, num_ranks: int, async_scheduling: bool, **config: Any
) -> Iterator[Engine]:
    defaults = dict(device="cpu", num_threads=1, num_blocks=64)
    settings = EngineConfig(
        model=str(directory),
        tensor_parallel_size=num_ranks,
        async_scheduling=async_scheduling,
        **defaults | config,
    )
    leader = Leader(num_ranks)
    followers = LocalFollowers(settings, leader)
    engine = Engine(settings, leader)
    try:
        yield engine
    finally:
        engine.close()
        followers.close()


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_a_new_kind_of_command_runs_on_all_ranks_between_steps(
    checkpoints: CheckpointFactory, async_scheduling: bool
) -> None:
    with engine_of(checkpoints("qwen3"), 2, async_scheduling) as engine:
        prompts = [[5, 6, 7], [9] * 40]
        alone = tokens_of(run(engine, new_requests(prompts)))
        for request in new_requests(prompts):
            engine.add(request)
        texts: dict[str, list[int]] = {"0": [], "1": []}
        sums = []
        while engine.has_work:
            sums.append(engine.executor.run(Sum(10 * len(sums))))
            for delta in engine.step():
                texts[delta.request_id] += delta.token_ids
        assert [total() for total in sums] == [20 * i + 1 for i in range(len(sums))]
        assert [texts["0"], texts["1"]] == alone


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_what_a_command_raises_reaches_whoever_gave_it(
    checkpoints: CheckpointFactory, async_scheduling: bool
) -> None:
    with engine_of(checkpoints("qwen3"), 1, async_scheduling) as engine:
        with pytest.raises(RuntimeError, match="fails on the leader"):
            engine.executor.run(Fail())()
        (output,) = run(engine, new_requests([[5]]))
        assert output.token_ids
