"""Our engine and llama.cpp on the same CPU cores and shape, taking turns, weights random.

For bf16, 8 and 4 bits and each batch size: prompt and decode tokens per second of both, medians
over the rounds, and the ratio of the decode speeds. llama.cpp is built from source, as usual:

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON
    cmake --build build --target llama-batched-bench llama-quantize
    pip install gguf
    python -m benchmarks.compare_llama_cpp --llama-cpp build/bin

Or, without a compiler, both on the same GGUF files, each as it is stored:

    python -m venv llama-venv && llama-venv/bin/pip install xllamacpp
    python -m benchmarks.compare_llama_cpp --llama-python llama-venv/bin/python --files *.gguf
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.floor import SHAPE
from benchmarks.shape import DenseShape, read_shape
from engine.device.threads import num_compute_threads

# Ours and llama.cpp's names for about the same number of bits.
_PAIRS: dict[str, str] = {"bf16": "BF16", "w8a8": "Q8_0", "int4": "Q4_0"}
_MAX_POSITION = 40_960
_Run = Callable[[], list[tuple[float, float]]]  # (prompt, decode) tokens/s of each batch size


def write_gguf(config: DenseShape, path: Path) -> None:
    """A GGUF file of a Qwen3 of this shape, bfloat16, head tied to the embedding, no tokenizer."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "qwen3")
    writer.add_context_length(_MAX_POSITION)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    draw = np.random.default_rng(0)

    def add_matrix(name: str, outputs: int, inputs: int) -> None:
        single = draw.standard_normal((outputs, inputs), dtype=np.float32) * 0.02
        halves = (single.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16, rounded down
        bf16 = GGMLQuantizationType.BF16
        writer.add_tensor(f"{name}.weight", halves.view(np.uint8), raw_dtype=bf16)

    def add_norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(size, dtype=np.float32))

    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    add_matrix("token_embd", config.vocab_size, hidden)
    add_norm("output_norm", hidden)
    for i in range(config.num_layers):
        add_norm(f"blk.{i}.attn_norm", hidden)
        add_norm(f"blk.{i}.attn_q_norm", config.head_dim)
        add_norm(f"blk.{i}.attn_k_norm", config.head_dim)
        add_norm(f"blk.{i}.ffn_norm", hidden)
        for name, outputs, inputs in (
            ("attn_q", q_size, hidden),
            ("attn_k", kv_size, hidden),
            ("attn_v", kv_size, hidden),
            ("attn_output", hidden, q_size),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            add_matrix(f"blk.{i}.{name}", outputs, inputs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run_llama_cpp(arguments: argparse.Namespace, model: Path) -> list[tuple[float, float]]:
    """(prompt, decode) tokens per second of each batch size."""
    tokens = max(arguments.batch) * (arguments.prompt + arguments.output)
    command = [arguments.llama_cpp / "llama-batched-bench", "-m", model, "-fa", "on", "-c", tokens]
    command += ["-npp", arguments.prompt, "-ntg", arguments.output, "-t", num_compute_threads()]
    command += ["-npl", ",".join(map(str, arguments.batch)), "--output-format", "jsonl"]
    lines = [json.loads(line) for line in _run(command).splitlines() if line.startswith("{")]
    return [(line["speed_pp"], line["speed_tg"]) for line in lines]


def run_llama_server(arguments: argparse.Namespace, model: Path) -> list[tuple[float, float]]:
    """The same of its server: all prompts with one token, then with all of the output."""
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

        def seconds(batch: int, output: int) -> float:
            start = time.perf_counter()
            prompts = [
                [1000 + (i * 37 + j * 7) % 9000 for j in range(arguments.prompt)]
                for i in range(batch)
            ]
            list(pool.map(lambda prompt: _complete(address, prompt, output), prompts))
            return time.perf_counter() - start

        seconds(1, 2)  # warms up
        results = []
        for batch in arguments.batch:
            one, all_of_them = seconds(batch, 1), seconds(batch, arguments.output)
            decode = batch * (arguments.output - 1) / max(all_of_them - one, 1e-9)
            results.append((batch * arguments.prompt / one, decode))
        process.stdin.close()
    return results


def _complete(address: str, prompt: list[int], output: int) -> None:
    body = {"prompt": prompt, "n_predict": output, "ignore_eos": True, "cache_prompt": False}
    request = urllib.request.Request(
        f"{address}/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as response:
        response.read()


def run_ours(arguments: argparse.Namespace, quantization: str) -> list[tuple[float, float]]:
    options = [] if quantization == "bf16" else ["--option", f"quantization={quantization}"]
    return _latency(arguments, arguments.model, options)


def _latency(
    arguments: argparse.Namespace, model: object, options: list[str]
) -> list[tuple[float, float]]:
    command = [sys.executable, "-m", "benchmarks.latency", "--model", model]
    command += ["--json", "/dev/stdout", "--prompt", arguments.prompt, "--output", arguments.output]
    command += ["--batch", *arguments.batch, *options]
    results = json.loads(_run(command).splitlines()[-1])
    return [(result["prompt_tok_s"], result["tok_s"]) for result in results]


def _run(command: list[object]) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def compare(arguments: argparse.Namespace, directory: Path) -> None:
    models = {"BF16": directory / "BF16.gguf"}
    write_gguf(read_shape(Path(arguments.model)), models["BF16"])
    for ours in arguments.bits:
        theirs = _PAIRS[ours]
        if theirs not in models:
            models[theirs] = directory / f"{theirs}.gguf"
            quantize = arguments.llama_cpp / "llama-quantize"
            _run([quantize, models["BF16"], models[theirs], theirs])
    _print_rounds(
        arguments,
        {
            ours: (
                partial(run_ours, arguments, ours),
                partial(run_llama_cpp, arguments, models[_PAIRS[ours]]),
            )
            for ours in arguments.bits
        },
    )


def compare_files(arguments: argparse.Namespace) -> None:
    options = ["--load-format", "safetensors"]  # what is there
    _print_rounds(
        arguments,
        {
            path.stem[-12:]: (
                partial(_latency, arguments, path, options),
                partial(run_llama_server, arguments, path),
            )
            for path in arguments.files
        },
    )


def _print_rounds(arguments: argparse.Namespace, pairs: dict[str, tuple[_Run, _Run]]) -> None:
    """By name ours and theirs."""
    print(f"prompts of {arguments.prompt} tokens, outputs of {arguments.output}; tokens/s, medians")
    print("bits         batch  prompt ours  llama.cpp  decode ours  llama.cpp  ratio")
    for name, (ours, theirs) in pairs.items():
        rounds = []
        for _ in range(arguments.rounds):
            theirs_now = theirs()
            rounds.append((ours(), theirs_now))
        for i, batch in enumerate(arguments.batch):
            prompt, decode, their_prompt, their_decode = (
                statistics.median(one[who][i][what] for one in rounds)
                for who in (0, 1)
                for what in (0, 1)
            )
            print(
                f"{name:12} {batch:5} {prompt:12.0f} {their_prompt:10.0f} {decode:12.1f} "
                f"{their_decode:10.1f} {decode / their_decode:6.2f}",
                flush=True,
            )
    print(f"load {os.getloadavg()[0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    theirs = parser.add_mutually_exclusive_group(required=True)
    theirs.add_argument("--llama-cpp", type=Path, help="where its programs are")
    theirs.add_argument("--llama-python", type=Path, help="a Python that has xllamacpp")
    parser.add_argument("--files", type=Path, nargs="+", default=[], help="with --llama-python")
    parser.add_argument("--model", default=str(SHAPE), help="directory of a config.json")
    parser.add_argument("--bits", nargs="+", choices=_PAIRS, default=list(_PAIRS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.llama_python:
        return compare_files(arguments)
    with tempfile.TemporaryDirectory() as directory:
        compare(arguments, Path(directory))


if __name__ == "__main__":
    main()
