"""What a crowd's queue costs another client: its time to the first token, by scheduling policy.

The crowd has so many requests queued at once, all under one key. The other client asks now and
then, and is timed from the request to its first token, in seconds and in steps of the engine.

    python -m benchmarks.fairness --crowd 1000
"""

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass, field

from engine import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.schedule.request import Request


@dataclass
class Outcome:
    ttft_s: list[float] = field(default_factory=list)
    ttft_steps: list[int] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    crowd_tokens: int = 0


def ask(engine: Engine, number: int, flow: str, arguments: argparse.Namespace) -> str:
    tokens = [(number * 31 + i * 7) % 200 + 10 for i in range(arguments.prompt)]
    params = SamplingParams(max_tokens=arguments.output, ignore_eos=True)
    request = Request(str(number), tokens, params, number, flow=flow)
    engine.add(request)
    return request.id


def measure(policy: str, crowd: int, arguments: argparse.Namespace) -> Outcome:
    config = EngineConfig.model_validate(
        {
            "model": arguments.model,
            "scheduling_policy": policy,
            "max_num_seqs": arguments.rows,
            "num_blocks": arguments.num_blocks,
            "max_model_len": 1024,
            "num_threads": 1,
        }
    )
    engine, outcome, numbers = Engine(config), Outcome(), itertools.count()
    for _ in range(crowd):
        ask(engine, next(numbers), "crowd", arguments)
    for _ in range(arguments.rows):
        if engine.has_work:
            engine.step()
    for _ in range(arguments.requests):
        own = ask(engine, next(numbers), "client", arguments)
        began, num_steps = time.perf_counter(), engine.num_steps
        is_first = True
        while own in engine.scheduler.sequences:
            step_began = time.perf_counter()
            deltas = engine.step()
            outcome.step_s.append(time.perf_counter() - step_began)
            outcome.crowd_tokens += sum(len(d.token_ids) for d in deltas if d.request_id != own)
            if is_first and any(delta.request_id == own for delta in deltas):
                is_first = False
                outcome.ttft_s.append(time.perf_counter() - began)
                outcome.ttft_steps.append(engine.num_steps - num_steps)
    engine.close()
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="manta-demo")
    parser.add_argument("--crowd", type=int, default=1000, help="requests queued by one key")
    parser.add_argument("--requests", type=int, default=20, help="of the other client, in turn")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--output", type=int, default=64, help="tokens")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--num-blocks", type=int, default=600)
    arguments = parser.parse_args()
    for policy, crowd in (("fair", 0), ("fair", arguments.crowd), ("fcfs", arguments.crowd)):
        outcome = measure(policy, crowd, arguments)
        print(
            f"{policy}, {crowd:5} queued by another: TTFT p50 "
            f"{statistics.median(outcome.ttft_s) * 1e3:6.1f} ms, most "
            f"{max(outcome.ttft_s) * 1e3:6.1f} ms, in {max(outcome.ttft_steps)} steps at most; "
            f"a step takes {statistics.median(outcome.step_s) * 1e3:.1f} ms; the crowd got "
            f"{outcome.crowd_tokens / sum(outcome.step_s):.0f} tok/s meanwhile",
            flush=True,
        )


if __name__ == "__main__":
    main()
