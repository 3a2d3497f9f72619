"""Compiles the Triton kernels for a GPU that is not there, as the ops launch them.

    python -m tests.kernels.compile_for_gpu [compute capability, default 90] [--few]

Runs the ops on CPU tensors, with a driver that only says which GPU to compile for and launches
nothing. Prints what each kernel takes of a multiprocessor; fails if a kernel does not compile,
spills more than a few registers, wants more shared memory than there is, is compiled again for
other lengths, or is launched otherwise than by Triton. With --few only what Qwen3 needs.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from benchmarks.launches import NoGpu, NoLauncher
from kernels import Ops
from kernels.cuda import launch, linear
from kernels.cuda.launch import CompileWatch
from kernels.cuda.ops import triton_ops
from kernels.types import (
    NO_DECODES,
    AttentionInputs,
    Decodes,
    KVCache,
    PagedKV,
    SamplingTable,
    StepRows,
)
from tests.kernels import grouped

FEW = "--few" in sys.argv
CAPABILITY = int(next((word for word in sys.argv[1:] if word.isdigit()), 90))
# Bytes that a block may have, by compute capability; 99 KiB is the least of those since Ampere.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}.get(CAPABILITY, 99 * 1024)
DECODING = Decodes(3, 3)
FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16


compiled: dict[str, tuple[str, Any]] = {}
run = JITFunction.run


def run_and_note(self: Any, *args: Any, **options: Any) -> Any:
    kernel = run(self, *args, **options)
    compiled[kernel.hash] = (self.__name__, kernel)
    return kernel


launched: list[list[object]] = []


class Noting(NoLauncher):
    def __call__(self, *args: object) -> None:
        """But for the stream, the handle and hooks; results lie elsewhere each time."""
        noted = [*args[:3], args[5], *args[9:]]
        launched.append([(x.dtype, x.shape) if isinstance(x, torch.Tensor) else x for x in noted])


class NotingGpu(NoGpu):
    launcher_cls = Noting


def is_launched_as_by_triton() -> bool:
    """Whether kernels get the same grids and arguments by the shorter way."""
    ways = []
    for is_known in (True, False):
        launch._IS_KNOWN = is_known
        launched.clear()
        attend(*ATTENTION[0], requests=16, tokens=32, decodes=Decodes(16, 32, 2))
        run_the_rest(17, BF16)
        ways.append([*launched])
    return len(ways[0]) > 10 and ways[0] == ways[1]


def attend(
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    block_size: int,
    window: int | None,
    cache: torch.dtype,
    softcap: float | None = None,
    requests: int = 5,
    tokens: int = 20,
    decodes: Decodes = DECODING,
    ops: Ops | None = None,
) -> None:
    ops = ops or OPS
    kv_cache = new_cache(block_size, head_dim, cache)
    contexts = torch.zeros(requests).int()
    starts = torch.zeros(3 * requests + 1).int()[2 * requests :]  # behind others, as it is sent
    q = torch.empty(tokens, 8 * group, head_dim, dtype=dtype)
    tables = torch.zeros(requests, 64).int()
    slots = torch.zeros(tokens, dtype=torch.int64)
    inputs = AttentionInputs(starts, contexts, tables, slots, decodes, tokens)
    planned = ops.attention.plan(inputs, kv_cache.spec)
    ops.attention.attend(q, kv_cache, planned, 0.1, window, softcap)


def new_cache(block_size: int, head_dim: int, dtype: torch.dtype) -> KVCache:
    spec = PagedKV(block_size, 8, head_dim, dtype)
    return OPS.attention.new_cache(4, spec, torch.device("cpu"))


def run_the_rest(tokens: int, cache: torch.dtype) -> None:
    """The other ops, as a step of Qwen3-0.6B calls them."""
    ops = OPS
    x, weight = torch.empty(tokens, 1024, dtype=BF16), torch.empty(1024, dtype=BF16)
    ops.rms_norm(x, weight, 1e-6)
    ops.add_rms_norm(x, x, weight, 1e-6)
    ops.silu_and_mul(torch.empty(tokens, 6144, dtype=BF16))
    weight_of_layer = torch.zeros(4096, 1024, dtype=BF16)
    DETERMINISTIC.pack_linear(weight_of_layer, None, None)(x)
    for linear_grouped in GROUPED:
        linear_grouped(x)
    if FP8 in CACHES and ops.rounding is not None:
        linear.round_rows(x)
        ops.rounding.add_rms_norm(x, x, weight, 1e-6)
        ops.rounding.silu_and_mul(torch.empty(tokens, 6144, dtype=BF16))
        ops.rounding.silu_and_mul(torch.empty(tokens, 2 * 28672, dtype=BF16))  # Llama-70B's
    kv_cache = new_cache(32, 128, cache)
    norm, at = torch.empty(128, dtype=BF16), torch.zeros(tokens, dtype=torch.int64)
    qkv = torch.empty(tokens, 4096, dtype=BF16)
    ops.norm_rotary_store(qkv, (norm, norm), 1e-6, at, torch.empty(4096, 128), kv_cache, at)
    k, v = qkv.unflatten(1, (-1, 128))[:, 16:].split(8, dim=1)
    ops.attention.store(k, v, kv_cache, at)
    # One below the other, so that they begin at odd places.
    numbers, at = torch.empty(3, tokens)[1], torch.zeros(2, tokens, dtype=torch.int64)[1]
    logits = torch.empty(tokens, 151_936, dtype=BF16)
    ops.sampling.sample(logits, SamplingTable(numbers, at, numbers, numbers, at), at, at)
    own = torch.empty(tokens, 151_936)
    text = torch.zeros(tokens, 100 + tokens, dtype=torch.int64)
    ops.sampling.penalize(own, text, at, text.int(), numbers, numbers, numbers)
    ops.sampling.top_logprobs(logits, at, 5)
    ops.sampling.apply_bitmask(own, torch.zeros(tokens, 4748, dtype=torch.int32))
    plan = torch.zeros(3 * tokens + 1, dtype=torch.int32)  # rows, starts, query_starts
    parts = plan[:tokens], plan[tokens : 2 * tokens], plan[2 * tokens :]
    tables = torch.zeros(64, 4096, dtype=torch.int64), torch.zeros(1, 64, 128, dtype=torch.int32)
    ops.prepare_step(StepRows(*parts, tokens * 3, NO_DECODES, 3), *tables, 32)


def resources(kernel: Any) -> tuple[int, int]:
    """(registers a thread, bytes a thread spills)"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found, printed
    return int(found[1]), int(found[2])


OPS, DETERMINISTIC = triton_ops(132), triton_ops(132, deterministic=True)
ATTENTION = [
    (BF16, 128, 2, 32, None, BF16),  # Qwen3-0.6B
    (BF16, 128, 4, 16, 4096, BF16),  # Mistral-7B
    (BF16, 64, 7, 32, None, BF16),
    (torch.float16, 80, 4, 64, None, torch.float16),
    (BF16, 256, 2, 16, 4096, BF16, 50.0),  # Gemma 2
    (torch.float32, 128, 2, 32, None, torch.float32),
    (torch.float32, 256, 2, 16, None, torch.float32),
][: 1 if FEW else None]

# Of 4 and of 8 bits in memory, with all that groups may have.
KINDS = grouped.KINDS[:: 8 if FEW else 3]
WEIGHTS = [grouped.random_weight(kind, 4096, 1024).stored() for kind in KINDS]
GROUPED = [linear.LinearGrouped([weight], None) for weight in WEIGHTS]

CACHES = [BF16]
if CAPABILITY >= 89:  # those before have no instructions for 8 bits
    ATTENTION.append((BF16, 128, 2, 128, None, FP8))
    CACHES.append(FP8)
FEW_TOKENS = (2, 17)  # of a request with drafts; in tiles of both sizes

if __name__ == "__main__":
    driver.set_active(NotingGpu(CAPABILITY))
    JITFunction.run = run_and_note
    watch = CompileWatch()
    for shape in ATTENTION:
        attend(*shape)
        for longest in FEW_TOKENS:
            attend(*shape, decodes=Decodes(3, 3 * longest, longest))
    attend(*ATTENTION[0], ops=DETERMINISTIC)
    for cache in CACHES:
        run_the_rest(5, cache)
    run_the_rest(50, BF16)  # as many rows take other tiles
    watch.start_serving()
    for shape in ATTENTION:
        for requests, tokens, decodes in (
            *((n, n, Decodes(n, n)) for n in (1, 7, 16)),
            (17, 2048, Decodes(16, 16)),
            (3, 999, NO_DECODES),
            (4, 9, Decodes(1, 1)),
            *((n, n * most, Decodes(n, n * most, most)) for n in (1, 16) for most in FEW_TOKENS),
            (2, 32, Decodes(2, 32, 16)),
        ):
            attend(*shape, requests=requests, tokens=tokens, decodes=decodes)
    for tokens in (1, 2, 15, 16, 17, 256):
        run_the_rest(tokens, BF16)
    failed = bool(watch.late) or not is_launched_as_by_triton()
    for name, kernel in compiled.values():
        registers, spilled = resources(kernel)
        shared = kernel.metadata.shared
        failed |= spilled > 64 or shared > SHARED_MEMORY
        if not kernel.metadata.enable_fp_fusion:  # of which every bit counts
            failed |= "fma.rn" in kernel.asm["ptx"]
        print(f"{name:26} {registers:4} registers, {spilled} B spilled, {shared:6} B shared")
    print(f"compiled {watch.num_compiled}, again for other lengths: {watch.late or 'none'}")
    sys.exit(failed)
