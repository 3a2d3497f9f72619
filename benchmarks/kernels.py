"""How fast the GPU ops are, next to what the GPU can do.

Each line names an op on the shapes of one layer of a model (Qwen3-0.6B's by default), its median
time, the memory it must move and the products it must compute per second, and the share of that
time which the ceilings, measured in the same run, would allow. Attention is measured with every
backend that is installed, on prompts and on decoding: the rule by which they are chosen
(`kernels/cuda/flash_attention.py`) is to be read off here.

    python -m benchmarks.kernels [--model DIRECTORY] [--only attention] [--json FILE]

`tests/gpu` rehearses it on a CPU.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.floor import SHAPE, best_seconds
from benchmarks.shape import DenseShape, read_shape
from kernels import AttentionNeeds, Ops, select_ops
from kernels.types import NO_DECODES, AttentionInputs, Decodes, KVCache, PagedKV, SamplingTable

_BF16, _FP8 = torch.bfloat16, torch.float8_e4m3fn


@dataclass(frozen=True)
class Sizes:
    """How much of everything. Contexts are drawn evenly up to twice their mean."""

    copy_bytes: int = 2**30
    product: int = 8192  # rows, columns and depth
    decodes: tuple[int, ...] = (1, 16, 64, 256)
    context: int = 1024
    prompts: tuple[tuple[int, int], ...] = ((4096, 1), (1024, 4), (512, 16))  # (length, number)
    tokens: tuple[int, ...] = (64, 256, 4096)
    rows: tuple[int, ...] = (1, 64, 256)  # that sample
    vocab_size: int | None = None  # the model's


@dataclass(frozen=True)
class Case:
    """One op on one shape, with the memory it must read and write, and its products."""

    name: str
    run: Callable[[], object]
    bytes_moved: float = 0
    flops: float = 0


@dataclass(frozen=True)
class Ceilings:
    bytes_per_s: float  # copied: read and written
    flops_per_s: float  # of a large matrix product in bfloat16


@dataclass(frozen=True)
class Result:
    name: str
    seconds: float
    bytes_per_s: float
    flops_per_s: float
    share: float  # of the least time that the ceilings allow


class Bench:
    """Makes inputs on the device, and measures.

    Args:
        backends: by name, the ops whose attention is measured; the first one's other ops too.
    """

    def __init__(
        self, config: DenseShape, sizes: Sizes, device: torch.device, backends: dict[str, Ops]
    ) -> None:
        self.config, self.sizes, self.device = config, sizes, device
        self.backends = backends
        self.ops = next(iter(backends.values()))

    def seconds(self, run: Callable[[], object]) -> float:
        """Median time on the GPU, with nothing in its cache from the call before."""
        if self.device.type != "cuda":
            return best_seconds(run, self.device, repeats=1)
        from triton.testing import do_bench

        return float(do_bench(run, warmup=50, rep=200, return_mode="median")) / 1e3

    def randn(self, *shape: int, dtype: torch.dtype = _BF16) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=self.device)

    def ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def ceilings(self) -> Ceilings:
        source = torch.empty(self.sizes.copy_bytes, dtype=torch.uint8, device=self.device)
        copy = torch.empty_like(source)
        copy_s = self.seconds(lambda: copy.copy_(source))
        size = self.sizes.product
        a, b = self.randn(size, size), self.randn(size, size)
        return Ceilings(2 * source.nbytes / copy_s, 2 * size**3 / self.seconds(lambda: a @ b))

    def measure(self, case: Case, ceilings: Ceilings) -> Result:
        seconds = self.seconds(case.run)
        least = max(case.bytes_moved / ceilings.bytes_per_s, case.flops / ceilings.flops_per_s)
        return Result(
            case.name, seconds, case.bytes_moved / seconds, case.flops / seconds, least / seconds
        )


# --- Attention --------------------------------------------------------------------------------


def attention_cases(bench: Bench) -> Iterator[Case]:
    config, draw = bench.config, random.Random(0)
    for count in bench.sizes.decodes:
        contexts = [draw.randint(1, 2 * bench.sizes.context) for _ in range(count)]
        for name, ops in bench.backends.items():
            yield _attention(bench, name, ops, [(1, context) for context in contexts], _BF16)
        yield _attention(bench, "8 bits", bench.ops, [(1, context) for context in contexts], _FP8)
    for length, count in bench.sizes.prompts:
        for name, ops in bench.backends.items():
            yield _attention(bench, name, ops, [(length, length)] * count, _BF16)
    if config.window is not None:
        return
    # The second half of a long prompt: a chunk whose context is already there.
    length = bench.sizes.prompts[0][0]
    for name, ops in bench.backends.items():
        yield _attention(bench, name, ops, [(length // 2, length)], _BF16)


def _attention(
    bench: Bench, backend: str, ops: Ops, lengths: list[tuple[int, int]], cache_dtype: torch.dtype
) -> Case:
    config = bench.config
    decoding = all(queries == 1 for queries, _ in lengths)
    heads, head_dim = config.num_heads, config.head_dim
    cache, block_tables = _filled_cache(bench, ops, lengths, cache_dtype)
    counts = [queries for queries, _ in lengths]
    q = bench.randn(sum(counts), heads, head_dim)
    # flash-attn leaves decoding to Triton; here it has to show that this is right.
    inputs = AttentionInputs(
        query_starts=bench.ints([sum(counts[:i]) for i in range(len(counts) + 1)]),
        context_lens=bench.ints([context for _, context in lengths]),
        block_tables=block_tables,
        slots=torch.empty(0, device=bench.device),  # all is stored already
        decodes=Decodes.of(counts) if decoding and "flash" not in backend else NO_DECODES,
        max_query_len=max(counts),
    )

    def run() -> Tensor:
        planned = ops.attention.plan(inputs, cache.spec)
        return ops.attention.attend(q, cache, planned, scale=head_dim**-0.5, window=config.window)

    seen = sum(queries * context - queries * (queries - 1) // 2 for queries, context in lengths)
    token_bytes = cache.spec.block_bytes // cache.spec.block_size
    kv_bytes = sum(context for _, context in lengths) * token_bytes
    kind = f"decode {len(lengths)}" if decoding else f"prompt {len(lengths)} x {lengths[0]}"
    return Case(
        f"attention, {kind}, {backend}",
        run,
        bytes_moved=kv_bytes + 2 * q.nbytes,
        flops=4 * heads * head_dim * seen,
    )


def _filled_cache(
    bench: Bench, ops: Ops, lengths: list[tuple[int, int]], dtype: torch.dtype
) -> tuple[KVCache, Tensor]:
    """A cache that holds these contexts in scattered blocks, and their block tables."""
    config, block_size = bench.config, _block_size(bench)
    counts = [-(-context // block_size) for _, context in lengths]
    num_blocks = sum(counts)
    spec = PagedKV(block_size, config.num_kv_heads, config.head_dim, dtype)
    cache = ops.attention.new_cache(num_blocks, spec, bench.device)
    for tensor in cache.tensors:
        tensor.copy_(torch.randn(tensor.shape, dtype=_BF16, device=bench.device))
    shuffled = torch.randperm(num_blocks).int()
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for i, blocks in enumerate(shuffled.split(counts)):
        tables[i, : len(blocks)] = blocks
    return cache, tables.to(bench.device)


def _block_size(bench: Bench) -> int:
    return 256 if any(name.endswith("-2") for name in bench.backends) else 128


# --- The rest ---------------------------------------------------------------------------------


def elementwise_cases(bench: Bench) -> Iterator[Case]:
    config, ops = bench.config, bench.ops
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv_heads = config.num_heads, config.num_kv_heads
    for tokens in bench.sizes.tokens:
        x, residual, weight = (
            bench.randn(tokens, hidden),
            bench.randn(tokens, hidden),
            bench.randn(hidden),
        )
        yield Case(
            f"add_rms_norm, {tokens} tokens",
            partial(ops.add_rms_norm, x, residual, weight, 1e-6),
            bytes_moved=4 * x.nbytes,
        )
        gate_up = bench.randn(tokens, 2 * inner)
        yield Case(
            f"silu_and_mul, {tokens} tokens",
            partial(ops.silu_and_mul, gate_up),
            bytes_moved=1.5 * gate_up.nbytes,
        )
        qkv = bench.randn(tokens, (heads + 2 * kv_heads) * head_dim)
        norm = bench.randn(head_dim)
        norms = (norm, norm) if config.qk_norm else None
        cache, _ = _filled_cache(bench, ops, [(1, tokens)], _BF16)
        index = torch.arange(tokens, device=bench.device)
        cos_sin = bench.randn(tokens, head_dim, dtype=torch.float32)
        yield Case(
            f"norm_rotary_store, {tokens} tokens",
            partial(ops.norm_rotary_store, qkv, norms, 1e-6, index, cos_sin, cache, index),
            bytes_moved=2 * qkv.nbytes + cos_sin.nbytes,
        )


def sampling_cases(bench: Bench) -> Iterator[Case]:
    ops, vocab = bench.ops, bench.sizes.vocab_size or bench.config.vocab_size
    for rows in bench.sizes.rows:
        logits = bench.randn(rows, vocab) * 3
        index = torch.arange(rows, device=bench.device)
        ones = torch.ones(rows, device=bench.device)
        for name, (temperature, top_k, top_p, min_p) in {
            "greedy": (0.0, 0, 1.0, 0.0),
            "temperature": (0.6, 0, 1.0, 0.0),
            "top_p": (0.6, 0, 0.95, 0.0),
            "top_k and top_p": (0.6, 20, 0.95, 0.0),
            "min_p": (0.6, 0, 1.0, 0.05),
        }.items():
            top_ks = torch.full_like(index, top_k)
            table = SamplingTable(
                ones * temperature, top_ks, ones * top_p, ones * min_p, seeds=index
            )
            yield Case(
                f"sample, {rows} rows, {name}",
                partial(ops.sampling.sample, logits, table, index, index),
                bytes_moved=logits.nbytes,
            )
        own = logits.float()
        mask = torch.zeros(rows, -(-vocab // 32), dtype=torch.int32, device=bench.device)
        yield Case(
            f"apply_bitmask, {rows} rows",
            partial(ops.sampling.apply_bitmask, own, mask),
            bytes_moved=own.nbytes + mask.nbytes,
        )


def linear_cases(bench: Bench) -> Iterator[Case]:
    """What is left to the library: the fused projections, of few tokens and of many."""
    config = bench.config
    heads = config.num_heads + 2 * config.num_kv_heads
    shapes = {
        "qkv": (config.hidden_size, heads * config.head_dim),
        "gate_up": (config.hidden_size, 2 * config.intermediate_size),
        "head": (config.hidden_size, bench.sizes.vocab_size or config.vocab_size),
    }
    for tokens in bench.sizes.tokens:
        for name, (inputs, outputs) in shapes.items():
            linear = bench.ops.pack_linear(bench.randn(outputs, inputs), None, None)
            x = bench.randn(tokens, inputs)
            yield Case(
                f"linear {name}, {tokens} tokens",
                partial(linear, x),
                bytes_moved=2 * (inputs * outputs + tokens * (inputs + outputs)),
                flops=2 * tokens * inputs * outputs,
            )


CASES = {
    "attention": attention_cases,
    "elementwise": elementwise_cases,
    "sampling": sampling_cases,
    "linear": linear_cases,
}


def find_backends(config: DenseShape, device: torch.device) -> dict[str, Ops]:
    """Triton's ops, and those with each flash-attn that is installed and serves the model."""
    from kernels.cuda import flash_attention

    def needs(backend: Any, block_size: int) -> AttentionNeeds:
        return AttentionNeeds(backend, _BF16, _BF16, config.head_dim, block_size)

    backends = {"triton": select_ops(device, needs("triton", 128))}
    for version in flash_attention.MODULES:
        try:
            ops = select_ops(device, needs(f"flash-attn-{version}", 256))
        except ValueError as error:
            print(error)
        else:
            backends[f"flash-attn-{version}"] = ops
    return backends


def measure(bench: Bench, only: str | None = None) -> tuple[Ceilings, list[Result]]:
    ceilings = bench.ceilings()
    print(
        f"copy {ceilings.bytes_per_s / 1e12:.2f} TB/s, "
        f"product {ceilings.flops_per_s / 1e12:.0f} TFLOP/s\n"
        f"{'':46} {'µs':>9} {'TB/s':>6} {'TFLOP/s':>8} {'share':>6}"
    )
    results = []
    for name, cases in CASES.items():
        if only is None or only == name:
            for case in cases(bench):
                result = bench.measure(case, ceilings)
                results.append(result)
                print(
                    f"{result.name:46} {result.seconds * 1e6:9.1f} "
                    f"{result.bytes_per_s / 1e12:6.2f} {result.flops_per_s / 1e12:8.1f} "
                    f"{result.share:6.0%}",
                    flush=True,
                )
    return ceilings, results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=SHAPE, help="directory of a config.json")
    parser.add_argument("--only", choices=CASES, help="only these ops")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU")
    torch.manual_seed(0)
    config, device = read_shape(arguments.model), torch.device("cuda")
    bench = Bench(config, Sizes(), device, find_backends(config, device))
    ceilings, results = measure(bench, arguments.only)
    if arguments.json:
        written = {"ceilings": asdict(ceilings), "results": [asdict(r) for r in results]}
        arguments.json.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
