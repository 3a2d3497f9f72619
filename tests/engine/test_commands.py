"""Ranks do what they are told, in order: steps, and commands that they have not been told of."""

from dataclasses import dataclass

import pytest
import torch

from engine.llm import LLM
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_requests, run, tokens_of


@dataclass(frozen=True)
class Sum:
    """Shows which ranks have run it: each adds its number, and all must take part."""

    value: int

    def run(self, runner: ModelRunner) -> int:
        own = torch.tensor(self.value + runner.parallel.rank)
        return int(runner.parallel.all_reduce(own).item())


@dataclass(frozen=True)
class Fail:
    def run(self, runner: ModelRunner) -> None:
        if runner.parallel.rank == 0:
            raise RuntimeError("this command fails on the leader")


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_a_new_kind_of_command_runs_on_all_ranks_between_steps(
    checkpoints: CheckpointFactory, async_scheduling: bool
) -> None:
    llm = LLM(
        str(checkpoints("qwen3")),
        tensor_parallel_size=2,
        async_scheduling=async_scheduling,
        device="cpu",
        num_threads=1,
        num_blocks=64,
    )
    try:
        engine, requests = llm.engine, new_requests([[5, 6, 7], [9] * 40])
        alone = tokens_of(run(engine, requests))
        for request in (requests := new_requests([[5, 6, 7], [9] * 40])):
            engine.add(request)
        sums = []
        while engine.has_work:
            sums.append(engine.executor.run(Sum(10 * len(sums))))
            engine.step()
        assert [total() for total in sums] == [20 * i + 1 for i in range(len(sums))]
        assert [request.output_token_ids for request in requests] == alone
    finally:
        llm.close()


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_what_a_command_raises_reaches_whoever_gave_it(
    checkpoints: CheckpointFactory, async_scheduling: bool
) -> None:
    llm = LLM(
        str(checkpoints("qwen3")), async_scheduling=async_scheduling, device="cpu", num_blocks=64
    )
    try:
        with pytest.raises(RuntimeError, match="fails on the leader"):
            llm.engine.executor.run(Fail())()
        output = llm.generate([[5]], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False)
        assert len(output[0].outputs[0].token_ids) == 2
    finally:
        llm.close()
