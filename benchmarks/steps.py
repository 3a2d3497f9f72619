"""Where the time of decoding steps goes: how long the host waits, and a GPU's kernels by time.

    python -m benchmarks.steps --batch 1 64 256

A host that waits for nothing is the slower of the two.
"""

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.autograd.profiler_util import DeviceType  # type: ignore[attr-defined]

from benchmarks.floor import SHAPE
from benchmarks.throughput import parse_option
from engine import LLM, SamplingParams
from engine.engine import Engine
from engine.schedule.request import Request
from engine.schedule.step import StepPlan, StepResult

_PROFILED = 10  # steps
_LONGEST = 14  # kernels that are listed


class Waiting:
    """Counts how long an engine's host waits for results."""

    def __init__(self, engine: Engine) -> None:
        self.seconds = 0.0
        self._launch = engine.executor.launch
        engine.executor.launch = self._timed  # type: ignore[method-assign]

    def _timed(self, plan: StepPlan) -> Callable[[], StepResult]:
        wait = self._launch(plan)

        def timed() -> StepResult:
            start = time.perf_counter()
            result = wait()
            self.seconds += time.perf_counter() - start
            return result

        return timed


def fill(engine: Engine, batch: int, prompt: int, output: int) -> None:
    """Run requests until all of them decode; raises ValueError if they never do together."""
    draw = random.Random(batch)
    params = SamplingParams(temperature=0.6, max_tokens=output, ignore_eos=True)
    for i in range(batch):
        tokens = [draw.randrange(engine.limits.vocab_size) for _ in range(prompt)]
        engine.add(Request(f"{batch}.{i}", tokens, params, seed=i))
    while engine.has_work:
        if len(engine.step()) == batch:
            return
    raise ValueError(f"batch: {batch} requests do not fit into the KV cache together")


def print_kernels(engine: Engine) -> None:
    """Of some steps, the kernels that took the longest."""
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[cuda]) as profile:
        for _ in range(_PROFILED):
            engine.step()
        torch.cuda.synchronize()
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in profile.events() or ():
        if event.device_type == DeviceType.CUDA:
            seconds[event.name] += event.time_range.elapsed_us()
            counts[event.name] += 1
    total, launches = sum(seconds.values()) / _PROFILED, sum(counts.values()) / _PROFILED
    print(f"  kernels: {total:.0f} µs and {launches:.0f} launches a step")
    for name in sorted(seconds, key=lambda name: -seconds[name])[:_LONGEST]:
        each, times = seconds[name] / _PROFILED, counts[name] / _PROFILED
        print(f"  {each:8.1f} µs {times:6.1f} x  {name[:90]}")


def give_up(engine: Engine) -> None:
    """Leave the engine without requests."""
    for request_id in list(engine.scheduler.sequences):
        engine.abort(request_id)
    while engine.has_work:
        engine.step()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(SHAPE), help="directory of a config.json")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--prompt", type=int, default=600, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=100, help="decoding steps to measure")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="any EngineConfig field"
    )
    arguments = parser.parse_args()
    # Chunks of some prompts may be computed while others decode already.
    output = arguments.steps + _PROFILED + arguments.prompt
    llm = LLM(
        arguments.model,
        load_format="dummy",
        max_model_len=arguments.prompt + output,
        max_num_seqs=max(arguments.batch),
        **dict(map(parse_option, arguments.option)),
    )
    engine, waiting = llm.engine, Waiting(llm.engine)
    for batch in arguments.batch:
        fill(engine, batch, arguments.prompt, output)
        waiting.seconds, start = 0.0, time.perf_counter()
        for _ in range(arguments.steps):
            engine.step()
        seconds = time.perf_counter() - start
        host_is_slower = waiting.seconds < 0.1 * seconds
        print(
            f"batch {batch}: {seconds / arguments.steps * 1e3:.3f} ms a step, of which the host "
            f"waits {waiting.seconds / arguments.steps * 1e3:.3f} ms: "
            f"{'THE HOST IS THE SLOWER' if host_is_slower else 'the device is the slower'}",
            flush=True,
        )
        if engine.runner.device.type == "cuda":
            print_kernels(engine)
        give_up(engine)


if __name__ == "__main__":
    main()
