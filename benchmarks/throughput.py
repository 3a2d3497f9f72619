"""Offline throughput on the workload that the nano-vLLM and vLLM comparisons use.

Each prompt is 100..max-input random tokens, each output 100..max-output, temperature 0.6, the
end-of-sequence token ignored. Prints tokens per second and their share of the machine's floor,
which is measured in the same run.

    python -m benchmarks.throughput --model benchmarks/shapes/qwen3-0.6b --load-format dummy \\
        --num-prompts 32 --max-input 512 --max-output 256

What a sampling parameter costs: run it with and without `--sampling frequency_penalty=0.5`,
`--sampling logprobs=5` and so on.
"""

import argparse
import json
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.floor import machine_for, workload_floor
from benchmarks.shape import read_shape
from engine import LLM, EngineConfig, SamplingParams
from engine.checkpoint.source import resolve


def make_workload(
    num_prompts: int,
    max_input: int,
    max_output: int,
    seed: int,
    sampling: dict[str, Any],
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Prompts of random tokens, and sampling parameters that fix each output's length."""
    draw = random.Random(seed)
    prompts = [
        [draw.randint(0, 10_000) for _ in range(draw.randint(100, max_input))]
        for _ in range(num_prompts)
    ]
    params = [
        SamplingParams(ignore_eos=True, max_tokens=draw.randint(100, max_output), **sampling)
        for _ in range(num_prompts)
    ]
    return prompts, params


def touch_kv_cache(llm: LLM) -> None:
    """Have the system hand out the memory of the KV cache, which on a CPU comes as it is used.

    vLLM's is filled with zeros when it starts; so that ours is not measured along.
    """
    for cache in llm.engine.runner.forward_pass.kv_caches:
        for tensor in cache.tensors:
            tensor.view(torch.uint8).zero_()


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    sampling = {"temperature": arguments.temperature}
    sampling |= dict(parse_option(option) for option in arguments.sampling)
    prompts, params = make_workload(
        arguments.num_prompts,
        arguments.max_input,
        arguments.max_output,
        arguments.seed,
        sampling,
    )
    options: dict[str, Any] = dict(
        load_format=arguments.load_format,
        max_model_len=arguments.max_input + arguments.max_output,
        max_num_seqs=arguments.max_num_seqs,
    )
    options |= dict(parse_option(option) for option in arguments.option)
    machine = machine_for(EngineConfig(model=arguments.model, **options))
    llm = LLM(arguments.model, **options)
    touch_kv_cache(llm)
    runner = llm.engine.runner
    vocabulary = llm.engine.limits.vocab_size
    prompts = [[token % vocabulary for token in prompt] for prompt in prompts]
    warm_up = SamplingParams(max_tokens=4, ignore_eos=True, **sampling)
    llm.generate([prompt[::-1] for prompt in prompts[:4]], warm_up, use_tqdm=False)

    steps_before = llm.engine.num_steps
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start

    lengths = [(len(o.prompt_token_ids), len(o.outputs[0].token_ids)) for o in outputs]
    config = read_shape(resolve(arguments.model))
    floor = workload_floor(
        config,
        lengths,
        arguments.max_num_seqs,
        runner.dtype.itemsize,
        machine,
        llm.config.quantization,
        runner.cache_dtype.itemsize,
    )
    num_input, num_output = map(sum, zip(*lengths, strict=True))
    return {
        "seconds": seconds,
        "input_tokens": num_input,
        "output_tokens": num_output,
        "output_tokens_per_s": num_output / seconds,
        "total_tokens_per_s": (num_input + num_output) / seconds,
        "steps": llm.engine.num_steps - steps_before,
        "preemptions": llm.engine.scheduler.stats.preemptions,
        "ops": runner.ops.name,
        "threads": torch.get_num_threads(),
        "machine": asdict(machine),
        "floor": asdict(floor) | {"total_s": floor.total_s},
        "share_of_floor": floor.total_s / seconds,
    }


def report(result: dict[str, Any]) -> None:
    machine, floor = result["machine"], result["floor"]
    print(
        f"{result['input_tokens']} tokens in, {result['output_tokens']} out, "
        f"{result['seconds']:.1f} s, {result['steps']} steps, "
        f"{result['preemptions']} preemptions, ops: {result['ops']}\n"
        f"output {result['output_tokens_per_s']:.1f} tok/s, "
        f"total {result['total_tokens_per_s']:.1f} tok/s\n"
        f"machine: {machine['bytes_per_s'] / 1e9:.1f} GB/s read, "
        f"{machine['flops_per_s'] / 1e9:.0f} GFLOP/s\n"
        f"floor {floor['total_s']:.1f} s: prompt FLOPs {floor['prompt_flops_s']:.1f} + KV reads "
        f"{floor['kv_read_s']:.1f} + weights {floor['weights_s']:.1f}; "
        f"reached {result['share_of_floor']:.1%} of it"
    )


def parse_option(option: str) -> tuple[str, Any]:
    """NAME=VALUE of a command line; values are JSON where they can be, else text."""
    name, _, value = option.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint directory or hub id")
    parser.add_argument("--load-format", default="safetensors", choices=["safetensors", "dummy"])
    parser.add_argument("--num-prompts", type=int, default=256)
    parser.add_argument("--max-input", type=int, default=1024)
    parser.add_argument("--max-output", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument(
        "--sampling",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any SamplingParams field, for all prompts",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="any EngineConfig field"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    arguments = parser.parse_args()
    result = run(arguments)
    report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
