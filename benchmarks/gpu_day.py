"""A first half hour with a GPU: parts of some minutes, each command with a limit of its own.

    python -m benchmarks.gpu_day look kernels headline    # about 6 minutes
    python -m benchmarks.gpu_day tests sweep              # 10
    python -m benchmarks.gpu_day 8b latency steps         # 6
    python -m benchmarks.gpu_day weights                  # 4
    python -m benchmarks.gpu_day nano vllm \\
        --nano-vllm-python nano-venv/bin/python --vllm-python vllm-venv/bin/python    # 10

Run in the repository's root. What a command says goes to DIRECTORY/NAME.log, its figures to
NAME.json, its last lines to the screen, and what they come to into a table at the end. A command
that fails or takes too long does not stop the others.

    python -m benchmarks.gpu_day rehearse                 # on a CPU, tiny: does it all still run?
"""

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.floor import SHAPE

_LARGE = SHAPE.parent / "qwen3-8b"
_VERSIONS = (
    "import torch, triton; print(torch.__version__, triton.__version__, torch.version.cuda, "
    "torch.cuda.get_device_properties(0))"
)
_WORKLOAD = ("--num-prompts", "256", "--max-input", "1024", "--max-output", "1024")
_TOO_LONG = 124


@dataclass(frozen=True)
class Job:
    """One command: a benchmark with its arguments, or any other program."""

    name: str
    limit_s: float
    command: tuple[str, ...]
    summary: Callable[[Any], str] | None = None  # of the JSON that it writes
    last: int = 12  # lines to show
    env: tuple[tuple[str, str], ...] = ()
    is_benchmark: bool = False

    @classmethod
    def of(
        cls,
        benchmark: str,
        *arguments: str,
        name: str = "",
        limit_s: float = 120,
        summary: Callable[[Any], str] | None = None,
        last: int = 12,
    ) -> "Job":
        command = (benchmark, *arguments)
        return cls(name or benchmark, limit_s, command, summary, last, is_benchmark=True)


# --- What a JSON comes to ---------------------------------------------------------------------


def _throughput(result: Any) -> str:
    return (
        f"{result['output_tokens_per_s']:9.0f} tok/s {result['share_of_floor']:6.1%} of the floor, "
        f"{result['steps']} steps, {result['preemptions']} preemptions"
    )


def _comparison(result: Any) -> str:
    tokens, seconds = result["output_tokens"], result["seconds"]
    return ", ".join(f"{name} {tokens / each:.0f} tok/s" for name, each in seconds.items())


def _latency(results: Any) -> str:
    return ", ".join(
        f"{one['batch']}: {one['step_ms']:.2f} ms ({one['floor_ms'] / one['step_ms']:.0%})"
        for one in results
    )


def _kernels(result: Any) -> str:
    attention = [one for one in result["results"] if one["name"].startswith("attention, decode")]
    shares = ", ".join(f"{one['name'][11:]} {one['share']:.0%}" for one in attention)
    ceilings = result["ceilings"]
    return (
        f"copies {ceilings['bytes_per_s'] / 1e12:.2f} TB/s, multiplies "
        f"{ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s; {shares}"
    )


# --- The parts --------------------------------------------------------------------------------


def _generate(name: str, model: Path, *settings: str, limit_s: float = 85) -> Job:
    """A throughput job; settings are options of the engine, or begin with "sampling:"."""
    options = []
    for setting in settings:
        kind, _, value = setting.rpartition(":")
        options.append(f"--{kind or 'option'}={value}")
    arguments = ("--model", str(model), "--load-format", "dummy", *_WORKLOAD, *options)
    return Job.of("throughput", *arguments, name=name, limit_s=limit_s, summary=_throughput, last=8)


def _compare(name: str, option: str, python: str, limit_s: float) -> Iterator[Job]:
    for model in (SHAPE, _LARGE):
        arguments = ("--model", str(model), *_WORKLOAD, "--max-num-seqs", "256", option, python)
        yield Job.of(
            *("compare_vllm", *arguments, "--rounds", "1", "--repeats", "2"),
            name=f"{name}-{model.name}",
            limit_s=limit_s,
            summary=_comparison,
        )


def parts(nano_vllm_python: str, vllm_python: str) -> dict[str, Callable[[], Iterable[Job]]]:
    """By name, what gives the jobs of each part."""
    budget = "max_num_batched_tokens=16384"
    tests = ("tests/gpu", "tests/kernels/test_triton.py")
    pytest = (sys.executable, "-m", "pytest", "-n", "4", "-p", "no:cacheprovider", *tests)
    return {
        "look": lambda: [
            Job("gpus", 60, ("nvidia-smi",), last=30),
            Job("links", 60, ("nvidia-smi", "topo", "-m")),
            Job("cpus", 60, ("lscpu",), last=20),
            Job("versions", 60, (sys.executable, "-c", _VERSIONS)),
            Job.of("smoke"),
        ],
        # The oracles compute on the host: with one thread they take minutes.
        "tests": lambda: [Job("tests", 240, pytest, last=40, env=(("OMP_NUM_THREADS", "3"),))],
        "kernels": lambda: [Job.of("kernels", summary=_kernels, last=75)],
        "headline": lambda: [
            _generate("0.6b", SHAPE),
            _generate("0.6b-budget-16384", SHAPE, budget),
        ],
        "sweep": lambda: [
            _generate("0.6b-block-128", SHAPE, budget, "block_size=128"),
            _generate("0.6b-fp8-cache", SHAPE, budget, "kv_cache_dtype=fp8"),
            _generate("0.6b-no-overlap", SHAPE, budget, "async_scheduling=false"),
            _generate("0.6b-prompts-launched", SHAPE, budget, "cuda_graph_max_tokens=0"),
            _generate("0.6b-deterministic", SHAPE, budget, "deterministic=true"),
            _generate(
                *("0.6b-top-k-top-p", SHAPE, budget, "sampling:top_k=20", "sampling:top_p=0.95")
            ),
        ],
        "8b": lambda: [
            _generate("8b", _LARGE, budget, limit_s=130),
            _generate("8b-fp8-cache", _LARGE, budget, "kv_cache_dtype=fp8", limit_s=130),
        ],
        "weights": lambda: [
            _generate("8b-fp8-weights", _LARGE, budget, "quantization=fp8", limit_s=130),
            _generate("8b-int4-weights", _LARGE, budget, "quantization=int4", limit_s=200),
        ],
        "latency": lambda: [
            Job.of(
                *("latency", "--batch", "1", "8", "64", "256", "--prompt", "600"),
                *("--output", "128"),
                summary=_latency,
            )
        ],
        "steps": lambda: [Job.of("steps", last=60)],
        "nano": lambda: _compare("nano-vllm", "--nano-vllm-python", nano_vllm_python, 150),
        "vllm": lambda: _compare("vllm", "--vllm-python", vllm_python, 280),
        "rehearse": _rehearsal,
    }


def _rehearsal() -> list[Job]:
    """Every benchmark that runs on a CPU, on the demo model's shape."""
    demo = ("--model", "manta-demo")
    room = ("--option", "num_blocks=64")
    sizes = ("--num-prompts", "2", "--max-input", "100", "--max-output", "100")
    return [
        Job.of("smoke", *demo),
        Job.of("throughput", *demo, *sizes, "--max-num-seqs", "2", summary=_throughput),
        Job.of(
            *("latency", *demo, "--batch", "1", "2", "--prompt", "16", "--output", "8"),
            *room,
            summary=_latency,
        ),
        Job.of("steps", *demo, "--batch", "1", "2", "--prompt", "8", "--steps", "4", *room),
    ]


# --- Running them -----------------------------------------------------------------------------


def run(job: Job, directory: Path, apart: bool = True) -> int:
    """The job's exit status: in a process of its own, or in this one, where its limit is nothing.

    With its children, which hold the GPU's memory, it is killed at the limit.
    """
    command, written = list(job.command), directory / f"{job.name}.json"
    written.unlink(missing_ok=True)  # of another day
    if job.is_benchmark:
        if job.summary is not None:
            command += ["--json", str(written)]
        if not apart:
            return _run_here(command, directory / f"{job.name}.log")
        command = [sys.executable, "-m", f"benchmarks.{command[0]}", *command[1:]]
    with (directory / f"{job.name}.log").open("w") as log:
        try:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(job.env),
                start_new_session=True,
            )
        except OSError as error:
            log.write(f"{error}\n")
            return 127
        try:
            return process.wait(job.limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return _TOO_LONG


def _run_here(command: list[str], log: Path) -> int:
    before, sys.argv = sys.argv, command
    try:
        with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            path = Path(__file__).with_name(f"{command[0]}.py")
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before
    return 0


def table_line(job: Job, directory: Path, status: int) -> str | None:
    """What the job came to, for the table; None when there is nothing to say."""
    written = directory / f"{job.name}.json"
    if job.summary is not None and written.exists():
        return f"{job.name:22} {job.summary(json.loads(written.read_text()))}"
    if status == 0:
        return None
    failed = f"took more than {job.limit_s} s" if status == _TOO_LONG else f"failed: {status}"
    return f"{job.name:22} {failed}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=parts("", ""))
    default = Path(os.environ.get("OUT") or Path(tempfile.gettempdir()) / "gpu-day")
    parser.add_argument("--directory", type=Path, default=default, help="for logs and figures")
    for name in ("nano-vllm", "vllm"):
        text = f"the interpreter of {name}'s environment"
        parser.add_argument(f"--{name}-python", default="", help=text)
    arguments = parser.parse_args()
    for part, python in (("nano", arguments.nano_vllm_python), ("vllm", arguments.vllm_python)):
        if part in arguments.parts and not python:
            parser.error(f"{part}: give its interpreter")
    arguments.directory.mkdir(parents=True, exist_ok=True)
    known = parts(arguments.nano_vllm_python, arguments.vllm_python)
    lines = []
    for part in arguments.parts:
        for job in known[part]():
            start = time.monotonic()
            status = run(job, arguments.directory, apart=part != "rehearse")
            seconds = time.monotonic() - start
            said = (arguments.directory / f"{job.name}.log").read_text(errors="replace")
            print(f"\n=== {job.name}: status {status}, {seconds:.0f} s")
            print("\n".join(said.splitlines()[-job.last :]), flush=True)
            lines.append(table_line(job, arguments.directory, status))
    print("\n" + "\n".join(filter(None, lines)), flush=True)


if __name__ == "__main__":
    main()
