"""Small engines to test with, and a way to run requests through them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.runner.model_runner import ModelRunner
from engine.sampling_params import SamplingParams
from engine.schedule.request import Request
from engine.schedule.step import NewRow, StepPlan

BLOCK_SIZE = 16


@contextmanager
def new_engine(directory: Path, **config: Any) -> Iterator[Engine]:
    """An engine of one checkpoint in fp32 on the CPU, a token of a row in each step that decodes.

    All unless `config` says otherwise.
    """
    defaults = dict(
        dtype="float32",
        device="cpu",
        num_threads=1,
        speculation="off",
        max_num_seqs=128,
        block_size=BLOCK_SIZE,
        num_blocks=1024,
    )
    engine = Engine(EngineConfig(model=str(directory), **defaults | config))
    try:
        yield engine
    finally:
        engine.close()


@dataclass
class Output:
    """What an engine made of one request."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_token: int | None = None
    num_cached_tokens: int = 0


def run(engine: Engine, requests: Iterable[Request]) -> list[Output]:
    """Run requests together until all have ended; outputs in the order of the requests.

    Every block must be free then, and every request ended exactly once.
    """
    outputs: dict[str, Output] = {}
    for request in requests:
        outputs[request.id] = Output()
        engine.add(request)
    while engine.has_work:
        for delta in engine.step():
            output = outputs[delta.request_id]
            assert output.finish_reason is None, "a token after the ending"
            output.token_ids += delta.token_ids
            output.finish_reason = delta.finish_reason
            output.stop_token = delta.stop_token
            output.num_cached_tokens = delta.num_cached_tokens
    assert all(output.finish_reason for output in outputs.values())
    pool = engine.scheduler.pool
    engine.scheduler.assert_invariants()
    assert pool.num_free == pool.num_blocks
    return list(outputs.values())


def run_one_by_one(engine: Engine, requests: Iterable[Request]) -> list[Output]:
    return [output for request in requests for output in run(engine, [request])]


def new_requests(prompts: Sequence[Sequence[int]], **params: Any) -> list[Request]:
    """One request per prompt, greedy unless `params` says otherwise; request i has seed i."""
    sampling = SamplingParams(**{"temperature": 0.0, "max_tokens": 16} | params)
    return [
        Request(str(i), list(prompt), sampling, seed=i if sampling.seed is None else sampling.seed)
        for i, prompt in enumerate(prompts)
    ]


def tokens_of(outputs: Iterable[Output]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def prompt_logits(runner: ModelRunner, tokens: list[int], block_table: list[int]) -> Tensor:
    """What a runner makes of a prompt in row 0 with these blocks: [V], of its last token."""
    new = NewRow(
        row=0,
        token_ids=tokens,
        num_prompt_tokens=len(tokens),
        block_tables=[block_table] * len(runner.cache_layout.groups),
        params=SamplingParams(),
        seed=0,
    )
    plan = StepPlan()
    plan.add(0, start=0, num_tokens=len(tokens), num_sampled=1)
    with torch.inference_mode():
        runner.tables.enter(new)
        return runner.sampler.logits(plan, runner.forward_pass.hidden_states(plan))[0]
