"""How fast a few requests decode: prompts of one length at a time, all at once.

For each batch size: prompt tokens per second, then the median decode step and its share of the
floor, which is the weights and the keys and values over the bandwidth measured in the same run.
Beside neighbours, each is measured without them first, and "quiet" is the speed that is left of it.

    python -m benchmarks.latency --batch 1 8 32
    python -m benchmarks.latency --prompt 8000 --batch 4 --option quantization=w8a8
    python -m benchmarks.latency --neighbours 2   # beside so many processes that never rest
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.floor import SHAPE, decode_step_s, machine_for
from benchmarks.shape import read_shape
from benchmarks.throughput import parse_option
from engine import LLM, EngineConfig, SamplingParams
from engine.checkpoint.source import resolve
from engine.schedule.request import Request


def measure(llm: LLM, batch: int, prompt: int, output: int, seed: int) -> dict[str, float]:
    """Seconds until all prompts are computed, and those of each decode step after that."""
    draw = random.Random(seed)
    vocabulary = llm.engine.limits.vocab_size
    params = SamplingParams(temperature=0.6, max_tokens=output, ignore_eos=True)
    for i in range(batch):
        tokens = [draw.randrange(vocabulary) for _ in range(prompt)]
        llm.engine.add(Request(f"{seed}.{i}", tokens, params, seed=i))
    start = end = time.perf_counter()
    prompt_s = 0.0
    started: set[str] = set()
    steps = []  # in which all of them get a token, and that is all
    while llm.engine.has_work:
        begin, deltas = end, llm.engine.step()
        end = time.perf_counter()
        if prompt_s and len(deltas) == batch:
            steps.append(end - begin)
        started |= {delta.request_id for delta in deltas}
        if len(started) == batch and not prompt_s:
            prompt_s = end - start
    if not steps:
        raise ValueError(f"output: the first of {output} tokens end before the last prompt does")
    return {
        "batch": batch,
        "prompt_tok_s": batch * prompt / prompt_s,
        "step_ms": statistics.median(steps) * 1e3,
        "tok_s": batch * len(steps) / sum(steps),
        "context": prompt + output / 2,
    }


@contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """Other processes that compute all the time, of the same priority."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(arguments: argparse.Namespace) -> list[dict[str, float]]:
    options: dict[str, Any] = dict(
        load_format=arguments.load_format,
        max_model_len=arguments.prompt + arguments.output,
        max_num_seqs=max(arguments.batch),
        enable_prefix_caching=False,
    )
    options |= dict(map(parse_option, arguments.option))
    config = EngineConfig(model=arguments.model, **options)
    machine = machine_for(config) if arguments.floor else None
    llm = LLM(arguments.model, **options)
    cache_bytes = llm.engine.runner.cache_dtype.itemsize
    measure(llm, min(2, max(arguments.batch)), 16, 4, seed=1)  # to warm up
    of_floor = "  floor ms  share" if arguments.floor else ""
    print(f"batch  prompt tok/s   step ms    tok/s{of_floor}  quiet")
    results = []
    for batch in arguments.batch:
        lengths = (batch, arguments.prompt, arguments.output)
        result = measure(llm, *lengths, seed=batch + 1)
        if arguments.neighbours:
            quiet_ms = result["step_ms"]
            with busy_neighbours(arguments.neighbours):
                result = measure(llm, *lengths, seed=batch + 2)
            result["of_quiet"] = quiet_ms / result["step_ms"]
        if machine is not None:
            shape, context = read_shape(resolve(arguments.model)), result["context"]
            quantization = llm.config.quantization
            floor_s = decode_step_s(shape, batch, context, machine, quantization, cache_bytes)
            result["floor_ms"] = floor_s * 1e3
        results.append(result)
        show(result)
    return results


def show(result: dict[str, float]) -> None:
    line = f"{result['batch']:5} {result['prompt_tok_s']:13.0f} {result['step_ms']:9.1f} "
    line += f"{result['tok_s']:8.1f}"
    if "floor_ms" in result:
        line += f" {result['floor_ms']:9.1f} {result['floor_ms'] / result['step_ms']:6.0%}"
    print(line + (f"{result['of_quiet']:7.0%}" if "of_quiet" in result else ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(SHAPE), help="checkpoint directory or hub id")
    parser.add_argument("--load-format", default="dummy", choices=["safetensors", "dummy"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=300, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of each output")
    parser.add_argument("--floor", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--neighbours", type=int, default=0, help="busy processes beside it")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="any EngineConfig field"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    arguments = parser.parse_args()
    results = run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
