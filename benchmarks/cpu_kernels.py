"""How fast the CPU ops are, next to what the machine can do.

Every line names an op on the shapes of one layer of Qwen3-0.6B (the default), its shortest and its
median time, the memory it must read and the products it must compute per second of the shortest
time, and the share of that time which the ceilings measured in the same run would allow. Layers
take turns, so that no weight or KV cache is in the processor's caches from the call before.

    python -m benchmarks.cpu_kernels [--model DIRECTORY] [--only linear]
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.floor import SHAPE, Machine, measure_machine
from benchmarks.shape import DenseShape, read_shape
from engine.device.threads import num_compute_threads
from kernels import Ops, select_ops
from kernels.quantization import Quantization
from kernels.reference import penalize
from kernels.types import AttentionInputs, Decodes, KVCache, PagedKV, SamplingTable

_TURN_BYTES = 2**28  # the layers that take turns have together: more than any cache
_BLOCK_SIZE = 32
_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One op on one shape; `run(i)` calls it on the layer whose turn is the i-th."""

    name: str
    run: Callable[[int], object]
    bytes_read: float = 0
    flops: float = 0


def measure(case: Case, machine: Machine, seconds: float) -> str:
    times: list[float] = []
    end = time.perf_counter() + seconds
    case.run(0)
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        case.run(len(times))
        times.append(time.perf_counter() - start)
    best = min(times)
    line = f"{case.name:36} {best * 1e3:9.3f} {statistics.median(times) * 1e3:9.3f}"
    line += f" {case.bytes_read / best / 1e9:8.1f} {case.flops / best / 1e9:9.0f}"
    floor = max(case.bytes_read / machine.bytes_per_s, case.flops / machine.flops_per_s)
    return line + (f" {floor / best:7.0%}" if floor else "")


def _num_copies(size: float) -> int:
    return max(1, round(_TURN_BYTES / size))


def linear_cases(ops: Ops, config: DenseShape) -> Iterator[Case]:
    """The fused projections of a layer and the LM head."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    shapes = {
        "qkv": (q_size + 2 * kv_size, hidden),
        "o": (hidden, q_size),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "head": (config.vocab_size, hidden),
    }
    kinds: dict[str, tuple[Quantization | None, float]] = {
        "bf16": (None, 2),
        "w8a8": ("w8a8", 1),
        "int4": ("int4", 4.75 / 8),
    }
    for name, (outputs, inputs) in shapes.items():
        weight = torch.randn(outputs, inputs, dtype=_DTYPE)
        for kind, (quantization, value_bytes) in kinds.items():
            copies = _num_copies(outputs * inputs * value_bytes)
            layers = [ops.pack_linear(weight, None, quantization) for _ in range(copies)]
            for rows in (1, 8, 32) if name == "head" else (1, 8, 32, 512):
                x = torch.randn(rows, inputs, dtype=_DTYPE)
                yield Case(
                    f"linear {name} {kind}, {rows} rows",
                    lambda i, x=x, layers=layers: layers[i % len(layers)](x),  # type: ignore[misc]
                    bytes_read=outputs * inputs * value_bytes,
                    # Products of bytes come at twice the rate of bfloat16's.
                    flops=2 * rows * outputs * inputs / (1 if quantization is None else 2),
                )


def attention_cases(ops: Ops, config: DenseShape) -> Iterator[Case]:
    """Single queries over long contexts, and prompts."""
    decode = [200 + 500 * i // 31 for i in range(32)]
    yield attention_case(ops, config, "decode, 32 x 200..700", [(1, n) for n in decode])
    yield attention_case(ops, config, "decode, 1 x 600", [(1, 600)])
    yield attention_case(ops, config, "decode, 4 x 8000", [(1, 8000)] * 4)
    yield attention_case(ops, config, "prompt, 1 x 300", [(300, 300)])
    yield attention_case(ops, config, "prompt, 1 x 2048", [(2048, 2048)])
    yield attention_case(ops, config, "prompt, last 512 of 4096", [(512, 4096)])


def attention_case(ops: Ops, config: DenseShape, name: str, lengths: list[tuple[int, int]]) -> Case:
    """lengths: (queries, context) of each request."""
    head_dim = config.head_dim
    counts = [-(-context // _BLOCK_SIZE) for _, context in lengths]
    contexts = torch.tensor([context for _, context in lengths]).int()
    bytes_read = 2 * int(contexts.sum()) * config.num_kv_heads * head_dim * _DTYPE.itemsize
    caches = []
    for _ in range(_num_copies(bytes_read)):
        cache = _new_cache(ops, config, sum(counts))
        for tensor in cache.tensors:
            tensor.normal_()
        caches.append(cache)
    blocks = torch.randperm(sum(counts)).int().split(counts)
    tables = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True)
    queries = torch.tensor([count for count, _ in lengths])
    starts = torch.cat((torch.zeros(1), queries.cumsum(0))).int()
    nowhere, longest = torch.empty(0), int(queries.max())
    decodes = Decodes.of(queries.tolist())
    inputs = AttentionInputs(starts, contexts, tables, nowhere, decodes, longest)
    q = torch.randn(int(starts[-1]), config.num_heads, head_dim, dtype=_DTYPE)
    pairs = sum(n * (context - n) + n * (n + 1) / 2 for n, context in lengths)
    return Case(
        f"attention, {name}",
        lambda i: ops.attention.attend(q, caches[i % len(caches)], inputs, head_dim**-0.5),
        bytes_read=bytes_read,
        flops=4 * pairs * config.num_heads * head_dim,
    )


def _new_cache(ops: Ops, config: DenseShape, num_blocks: int) -> KVCache:
    spec = PagedKV(_BLOCK_SIZE, config.num_kv_heads, config.head_dim, _DTYPE)
    return ops.attention.new_cache(num_blocks, spec, torch.device("cpu"))


def other_cases(ops: Ops, config: DenseShape) -> Iterator[Case]:
    """What is small in a step of 32 rows."""
    rows = 32
    x = torch.randn(rows, config.hidden_size, dtype=_DTYPE)
    weight = torch.ones(config.hidden_size, dtype=_DTYPE)
    yield Case("add + norm", lambda _: ops.add_rms_norm(x, x, weight, 1e-6))
    gate_up = torch.randn(rows, 2 * config.intermediate_size, dtype=_DTYPE)
    yield Case("SiLU and multiply", lambda _: ops.silu_and_mul(gate_up))
    heads = config.num_heads + 2 * config.num_kv_heads
    qkv = torch.randn(rows, heads * config.head_dim, dtype=_DTYPE)
    cache = _new_cache(ops, config, 1)
    norm = torch.ones(config.head_dim, dtype=_DTYPE)
    cos_sin, at = torch.randn(rows, config.head_dim), torch.arange(rows)
    yield Case(
        "q/k norm, rotary, store",
        lambda _: ops.norm_rotary_store(qkv, (norm, norm), 1e-6, at, cos_sin, cache, at),
    )
    yield from _sampling_cases(ops, config, rows)


def _sampling_cases(ops: Ops, config: DenseShape, rows: int) -> Iterator[Case]:
    sampling, at = ops.sampling, torch.arange(rows)
    logits = torch.randn(rows, config.vocab_size, dtype=_DTYPE) * 2
    for name, top_k, top_p in (
        ("", 0, 1.0),
        (", top_k 20, top_p .95", 20, 0.95),
        (", top_p", 0, 0.95),
    ):
        table = SamplingTable(
            torch.full((rows,), 0.6),
            torch.full((rows,), top_k),
            torch.full((rows,), top_p),
            torch.zeros(rows),
            at,
        )
        yield Case(
            f"sample{name}",
            lambda _, table=table: sampling.sample(logits, table, at, at),  # type: ignore[misc]
            bytes_read=logits.nbytes,
        )
    for count in (0, 5, 20):
        yield Case(
            f"log-probabilities, top {count}",
            lambda _, count=count: sampling.top_logprobs(logits, at, count),  # type: ignore[misc]
            bytes_read=logits.nbytes,
        )
    yield Case("logits to float32", lambda _: logits[at].float(), bytes_read=logits.nbytes)
    single = logits.float()
    mask = torch.randint(-(2**31), 2**31, (rows, -(-config.vocab_size // 32))).int()
    yield Case("bitmask", lambda _: sampling.apply_bitmask(single, mask), bytes_read=mask.nbytes)
    tokens = torch.randint(config.vocab_size, (rows, 700))
    halves = torch.full((rows,), 0.5)
    yield Case(
        "penalties, 32 x 700 tokens",
        lambda _: penalize(single, tokens, 700 - at, tokens.int(), halves, halves, halves),
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=SHAPE, help="directory of a config.json")
    parser.add_argument("--only", default="", help="only ops whose name contains this")
    parser.add_argument("--seconds", type=float, default=0.5, help="per op")
    parser.add_argument("--threads", type=int, default=num_compute_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ops = select_ops(torch.device("cpu"))
    config = read_shape(arguments.model)
    machine = measure_machine(torch.device("cpu"), _DTYPE)
    print(
        f"{ops.name}, {arguments.threads} threads; ceiling {machine.bytes_per_s / 1e9:.1f} GB/s, "
        f"{machine.flops_per_s / 1e9:.0f} GFLOP/s\n"
        f"{'op':36} {'min ms':>9} {'median':>9} {'GB/s':>8} {'GFLOP/s':>9} {'ceiling':>7}"
    )
    for cases in (linear_cases, attention_cases, other_cases):
        for case in cases(ops, config):
            if arguments.only in case.name:
                print(measure(case, machine, arguments.seconds), flush=True)


if __name__ == "__main__":
    main()
