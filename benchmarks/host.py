"""What the host does for a step that decodes, on a device that costs nothing: torch's meta device.

Tensors there have a shape and no values, so all that is left of a step is what the host does beside
the device: the schedule, the plan's way to the other ranks, the launches, the tokens' way back.
Everything is the engine's own but the kernels, which do nothing, and the tokens, which are all 0.
Steps are scheduled ahead and replayed as on a GPU. The other ranks only listen.

    python -m benchmarks.host --rows 1 64 256 --sampling frequency_penalty=0.5 --ranks 1 8

Prints milliseconds per step of the processor's time, so that others on the machine count for
little: the median of many, of all and by its parts. With `--nano-vllm DIR`, a checkout of it,
nano-vLLM's own host beside it, in turn.
"""

import argparse
import cProfile
import gc
import multiprocessing
import pstats
import random
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Client, Listener
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.floor import SHAPE
from benchmarks.host_nano_vllm import measure_nano_vllm
from benchmarks.throughput import parse_option
from engine import SamplingParams
from engine.config import EngineConfig
from engine.device.memory import DeviceMemory
from engine.device.transfer import ToHost
from engine.engine import Engine
from engine.models import loader
from engine.models.blocks.linear import ShardedModule
from engine.models.decoder import CausalLM
from engine.ranks.group import Leader
from engine.ranks.rank_group import Ranks
from engine.runner import executor, model_runner
from engine.schedule.request import Request
from kernels.ops import REFERENCE, Ops
from kernels.reference import PagedAttention
from kernels.types import AttentionInputs, KVCache, StepInputs, StepRows

META = torch.device("meta")


class NoAttention(PagedAttention):
    def store(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None: ...

    def attend(
        self, q: Tensor, cache: KVCache, inputs: AttentionInputs, *_: Any, **__: Any
    ) -> Tensor:
        return torch.empty_like(q)


class NoSampling:
    def sample(self, logits: Tensor, *_: object) -> Tensor:
        return torch.empty(len(logits), dtype=torch.int64, device=META)

    def penalize(self, *_: Tensor) -> None: ...

    def apply_bitmask(self, *_: Tensor) -> None: ...

    def top_logprobs(
        self, logits: Tensor, token_ids: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape = len(logits), 1 + count
        ids = torch.empty(shape, dtype=torch.int64, device=META)
        return ids, torch.empty(shape, device=META), token_ids


class NoRecorder:
    ahead = False

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None] | None]:
        return run(), lambda: None


def _no_linear(weight: Tensor, *_: object) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.empty(len(x), len(weight), device=META)


def prepare_nothing(
    step: StepRows, token_table: Tensor, block_tables: Tensor, block_size: int
) -> StepInputs:
    groups, _, num_blocks = block_tables.shape
    numbers = torch.empty(step.num_tokens, dtype=torch.int64, device=META)
    tables = torch.empty(groups, len(step.rows), num_blocks, dtype=torch.int32, device=META)
    slots = numbers.expand(groups, step.num_tokens)
    return StepInputs.of(step, numbers, numbers, step.starts, tables, slots)


def no_ops(*_: Any) -> Ops:
    return replace(
        REFERENCE,
        name="nothing",
        attention=NoAttention(),
        pack_linear=_no_linear,
        sampling=NoSampling(),
        new_recorder=NoRecorder,
        prepare_step=prepare_nothing,
    )


class Speaker(Leader):
    """A leader of ranks that only listen."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._followers = []
        with Listener(("127.0.0.1", 0)) as door:
            for _ in range(size - 1):
                fork = multiprocessing.get_context("fork")
                fork.Process(target=_listen, args=(door.address,), daemon=True).start()
                self._followers.append(door.accept())

    def gather(self, device: torch.device) -> Ranks:
        return Ranks()


def _listen(address: tuple[str, int]) -> None:
    connection = Client(address)
    while True:
        try:
            connection.recv_bytes()
        except EOFError:
            return


def new_engine(num_rows: int, num_ranks: int, max_len: int) -> Engine:
    """One on the meta device, with room for all."""
    config = EngineConfig(
        model=str(SHAPE),
        load_format="dummy",
        max_num_seqs=num_rows,
        max_num_batched_tokens=max(2048, num_rows),
        max_model_len=max_len,
        num_blocks=num_rows * -(-max_len // 32),
        async_scheduling=True,
        tensor_parallel_size=num_ranks,
    )
    endless = DeviceMemory(1 << 50, 1 << 50, True)
    with (
        patch.object(executor, "select_device", lambda _: META),
        patch.object(model_runner, "select_device", lambda _: META),
        patch.object(model_runner, "select_ops", no_ops),
        patch.object(loader, "load_dummy_weights", _pack_only),
        patch.object(DeviceMemory, "of", lambda *_: endless),
    ):
        return Engine(config, Speaker(num_ranks))


def _pack_only(model: CausalLM, _: int, pack: Callable[[ShardedModule], None]) -> None:
    for module in model.modules():
        if isinstance(module, ShardedModule):
            pack(module)


class Stopwatch:
    """Seconds that this thread has computed within some calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.thread_time()
            result = call(*args)
            self.seconds[name] = time.thread_time() - start
            return result

        return timed


def measure(
    num_rows: int, num_ranks: int, sampling: dict[str, Any], num_steps: int, profile: bool
) -> dict[str, float]:
    """Median milliseconds of a step, and of its parts."""
    draw = random.Random(0)
    engine = new_engine(num_rows, num_ranks, 192 + num_steps + 64)
    params = SamplingParams(ignore_eos=True, max_tokens=num_steps + 64, **sampling)
    for i in range(num_rows):
        prompt = [draw.randrange(1000) for _ in range(draw.randint(97, 128))]
        engine.add(Request(str(i), prompt, params, seed=i))
    while engine.scheduler.waiting or any(s.num_uncomputed > 1 for s in engine.scheduler.running):
        engine.step()
    watch = Stopwatch()
    engine.scheduler.schedule = watch.watch("schedule", engine.scheduler.schedule)  # type: ignore[method-assign]
    engine.executor.launch = watch.watch("launch", engine.executor.launch)  # type: ignore[method-assign]
    engine.scheduler.update = watch.watch("update", engine.scheduler.update)  # type: ignore[method-assign]
    step, stats = watch.watch("step", engine.step), watch.watch("stats", engine.stats)
    samples: list[dict[str, float]] = []
    gc.collect()
    gc.freeze()
    profiler = cProfile.Profile()
    for i in range(num_steps):
        if profile and i == num_steps // 2:
            profiler.enable()
        assert len(step()) == num_rows
        stats()
        samples.append(dict(watch.seconds))
    profiler.disable()
    gc.unfreeze()
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(25)
        samples = samples[: num_steps // 2]
    engine.close()
    return {name: 1e3 * median(s[name] for s in samples) for name in samples[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sampling", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--nano-vllm", type=Path, metavar="DIR", help="a checkout, to compare with")
    parser.add_argument("--profile", action="store_true", help="of the second half of the steps")
    arguments = parser.parse_args()
    sampling = dict(parse_option(option) for option in arguments.sampling)
    # What the device brings has no values.
    zeros = lambda brought: torch.zeros(brought._host.shape, dtype=brought._host.dtype)  # noqa: E731
    with patch.object(ToHost, "wait", zeros):
        for num_ranks in arguments.ranks:
            for num_rows in arguments.rows:
                parts = measure(num_rows, num_ranks, sampling, arguments.steps, arguments.profile)
                shown = ", ".join(f"{name} {ms:.3f}" for name, ms in parts.items())
                print(f"{num_rows} rows, {num_ranks} ranks, ms: {shown}", flush=True)
                if arguments.nano_vllm is not None and num_ranks == 1:
                    theirs = measure_nano_vllm(arguments.nano_vllm, num_rows, arguments.steps)
                    print(f"{num_rows} rows, nano-vLLM, ms: step {theirs['step']:.3f}", flush=True)


if __name__ == "__main__":
    main()
