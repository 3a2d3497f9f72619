"""Our engine and llama.cpp on the same GGUF files and CPU cores, taking turns.

For each file and batch size: prompt and decode tokens per second of both, medians over the rounds,
and the ratios. Without --files they are random ones of a shape, made once and kept (--keep).

    python -m venv llama-venv && llama-venv/bin/pip install xllamacpp   # its server, compiled
    python -m benchmarks.compare_llama_cpp --llama-python llama-venv/bin/python --files *.gguf
    python -m benchmarks.compare_llama_cpp --llama-python llama-venv/bin/python --mix Q4_0 BF16

Or, with llama.cpp built from source:

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON
    cmake --build build --target llama-batched-bench
    python -m benchmarks.compare_llama_cpp --llama-cpp build/bin
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.floor import SHAPE
from benchmarks.random_gguf import MIXES, write_gguf
from benchmarks.shape import read_shape
from engine.checkpoint.derived import cache
from engine.device.threads import num_compute_threads

_Speeds = list[tuple[float, float]]  # (prompt, decode) tokens/s of each batch size


def run_batched_bench(arguments: argparse.Namespace, model: Path) -> _Speeds:
    tokens = max(arguments.batch) * (arguments.prompt + arguments.output)
    command = [arguments.llama_cpp / "llama-batched-bench", "-m", model, "-fa", "on", "-c", tokens]
    command += ["-npp", arguments.prompt, "-ntg", arguments.output, "-t", num_compute_threads()]
    command += ["-npl", ",".join(map(str, arguments.batch)), "--output-format", "jsonl"]
    lines = [json.loads(line) for line in _run(command).splitlines() if line.startswith("{")]
    return [(line["speed_pp"], line["speed_tg"]) for line in lines]


def run_server(arguments: argparse.Namespace, model: Path) -> _Speeds:
    """All prompts with one token; then, with their keys and values kept, all of the output."""
    server = Path(__file__).with_name("llama_server.py")
    tokens = arguments.prompt + arguments.output + 8
    command = [arguments.llama_python, server, model, num_compute_threads()]
    command += [max(arguments.batch), tokens]
    process = subprocess.Popen(
        list(map(str, command)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process, ThreadPoolExecutor(max(arguments.batch)) as pool:
        assert process.stdin is not None and process.stdout is not None
        lines = (line.split() for line in process.stdout)
        address = next(words[1] for words in lines if words[:1] == ["address"])

        def seconds(batch: int, output: int, salt: int = 0) -> float:
            prompts = [
                [1000 + (salt + batch * 5 + i * 37 + j * 7) % 9000 for j in range(arguments.prompt)]
                for i in range(batch)
            ]
            start = time.perf_counter()
            list(pool.map(lambda prompt: _complete(address, prompt, output), prompts))
            return time.perf_counter() - start

        seconds(1, 2, salt=3)  # warms up, with a prompt that is not asked again
        results = []
        for batch in arguments.batch:
            prompt_s, decode_s = seconds(batch, 1), seconds(batch, arguments.output)
            results.append(
                (batch * arguments.prompt / prompt_s, batch * arguments.output / decode_s)
            )
        process.stdin.close()
    return results


def _complete(address: str, prompt: list[int], output: int) -> None:
    body = {"prompt": prompt, "n_predict": output, "ignore_eos": True, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        response.read()


def run_ours(arguments: argparse.Namespace, model: Path) -> _Speeds:
    command = [sys.executable, "-m", "benchmarks.latency", "--model", model, "--no-floor"]
    command += ["--load-format", "safetensors", "--json", "/dev/stdout"]  # what is there
    command += ["--prompt", arguments.prompt, "--output", arguments.output]
    for option in ("speculation=off", *arguments.option):
        command += ["--option", option]
    results = json.loads(_run([*command, "--batch", *arguments.batch]).splitlines()[-1])
    return [(result["prompt_tok_s"], result["tok_s"]) for result in results]


def _run(command: list[object]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def shape_files(arguments: argparse.Namespace) -> list[Path]:
    shape, directory = Path(arguments.model), Path(arguments.keep)
    directory.mkdir(parents=True, exist_ok=True)
    files = [directory / f"{shape.name}-{mix}.gguf" for mix in arguments.mix]
    for mix, file in zip(arguments.mix, files, strict=True):
        if not file.exists():
            unfinished = file.with_suffix(".part")
            write_gguf(read_shape(shape), unfinished, mix)
            unfinished.rename(file)
    return files


def compare(arguments: argparse.Namespace, file: Path) -> None:
    theirs = run_server if arguments.llama_python else run_batched_bench
    rounds = []
    for _ in range(arguments.rounds):
        theirs_now = theirs(arguments, file)
        rounds.append((run_ours(arguments, file), theirs_now))
    for i, batch in enumerate(arguments.batch):
        prompt, decode, their_prompt, their_decode = (
            statistics.median(one[who][i][what] for one in rounds)
            for who in (0, 1)
            for what in (0, 1)
        )
        print(
            f"{file.stem[-16:]:16} {batch:5} {prompt:12.0f} {their_prompt:10.0f} "
            f"{prompt / their_prompt:6.2f} {decode:12.1f} {their_decode:10.1f} "
            f"{decode / their_decode:6.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    theirs = parser.add_mutually_exclusive_group(required=True)
    theirs.add_argument("--llama-cpp", type=Path, help="where its programs are")
    theirs.add_argument("--llama-python", type=Path, help="a Python that has xllamacpp")
    parser.add_argument("--files", type=Path, nargs="+", default=[])
    parser.add_argument("--model", default=str(SHAPE), help="shape: directory of a config.json")
    parser.add_argument("--mix", nargs="+", choices=MIXES, default=list(MIXES), help="of the shape")
    parser.add_argument("--keep", type=Path, default=cache() / "random", help="where")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of our EngineConfig"
    )
    arguments = parser.parse_args()
    files = arguments.files or shape_files(arguments)
    print(f"prompts of {arguments.prompt} tokens, outputs of {arguments.output}; tokens/s, medians")
    print("file             batch  prompt ours  llama.cpp  ratio  decode ours  llama.cpp  ratio")
    for file in files:
        compare(arguments, file)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
