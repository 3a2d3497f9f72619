"""Our engine and llama.cpp on the same CPU cores and shape, taking turns, weights random.

For bf16, 8 and 4 bits and each batch size: prompt and decode tokens per second of both, medians
over the rounds, and the ratio of the decode speeds. llama.cpp is built from source, as usual:

    cmake -B build -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON
    cmake --build build --target llama-batched-bench llama-quantize
    pip install gguf
    python -m benchmarks.compare_llama_cpp --llama-cpp build/bin
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.floor import SHAPE
from benchmarks.shape import DenseShape, read_shape
from engine.device.threads import num_compute_threads

# Ours and llama.cpp's names for about the same number of bits.
_PAIRS: dict[str, str] = {"bf16": "BF16", "w8a8": "Q8_0", "int4": "Q4_0"}
_MAX_POSITION = 40_960


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


def run_ours(arguments: argparse.Namespace, quantization: str) -> list[tuple[float, float]]:
    command = [sys.executable, "-m", "benchmarks.latency", "--model", arguments.model]
    command += ["--json", "/dev/stdout", "--prompt", arguments.prompt, "--output", arguments.output]
    command += ["--batch", *arguments.batch]
    if quantization != "bf16":
        command += ["--option", f"quantization={quantization}"]
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
    print(f"prompts of {arguments.prompt} tokens, outputs of {arguments.output}; tokens/s, medians")
    print("bits  batch  prompt ours  llama.cpp  decode ours  llama.cpp  ratio")
    for ours in arguments.bits:
        rounds = []
        for _ in range(arguments.rounds):
            theirs_now = run_llama_cpp(arguments, models[_PAIRS[ours]])
            rounds.append((run_ours(arguments, ours), theirs_now))
        for i, batch in enumerate(arguments.batch):
            prompt, decode, their_prompt, their_decode = (
                statistics.median(one[who][i][what] for one in rounds)
                for who in (0, 1)
                for what in (0, 1)
            )
            print(
                f"{ours:5} {batch:5} {prompt:12.0f} {their_prompt:10.0f} {decode:12.1f} "
                f"{their_decode:10.1f} {decode / their_decode:6.2f}",
                flush=True,
            )
    print(f"load {os.getloadavg()[0]:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--llama-cpp", type=Path, required=True, help="where its programs are")
    parser.add_argument("--model", default=str(SHAPE), help="directory of a config.json")
    parser.add_argument("--bits", nargs="+", choices=_PAIRS, default=list(_PAIRS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=300)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        compare(arguments, Path(directory))


if __name__ == "__main__":
    main()
