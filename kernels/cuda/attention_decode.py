"""Attention of single queries: split-KV decoding, balanced over the device."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.attention_tile import STAGES, attend_tile, kv_offsets, score_unit
from kernels.types import AttentionInputs, KVCache

_MIN_CHUNK = 128  # tokens; below, reading the chunk is cheaper than combining it


@dataclass(frozen=True)
class DecodePlan:
    """How the attention of one step is cut up, the same for all layers.

    The context of the first `num_decodes` requests, which have one query each, is cut into chunks
    of `chunk_len` [1] tokens; request i has chunks chunk_starts[i] .. chunk_starts[i + 1] - 1, both
    int32 on the device. There are at most `max_chunks`.
    """

    num_decodes: int
    max_chunks: int
    chunk_starts: Tensor
    chunk_len: Tensor


@triton.jit(do_not_specialize=["num_rows", "target"])
def _plan_kernel(
    context_lens, chunk_starts, chunk_len, num_rows, target,
    MIN_CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([], tl.int64)
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(context_lens + rows, rows < num_rows, 0).to(tl.int64))
    # Whole multiples, so that chunks begin on tile boundaries.
    length = (tl.cdiv(tl.cdiv(total, target), MIN_CHUNK) * MIN_CHUNK).to(tl.int32)
    length = tl.maximum(length, MIN_CHUNK)
    tl.store(chunk_len, length)
    tl.store(chunk_starts, 0)
    before = tl.zeros([], tl.int32)
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        counts = tl.cdiv(tl.load(context_lens + rows, rows < num_rows, 0), length)
        tl.store(chunk_starts + rows + 1, before + tl.cumsum(counts, 0), rows < num_rows)
        before += tl.sum(counts, 0)


@triton.jit(do_not_specialize=["num_rows"])
def _decode_kernel(
    q, k_cache, v_cache, out, chunk_out, chunk_lse,
    chunk_starts, chunk_len, context_lens, block_tables, table_stride, num_rows, scale,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of one request's context, for the query heads of one key/value head."""
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    if item >= tl.load(chunk_starts + num_rows):
        return
    row, high = item * 0, num_rows  # the last row whose chunks begin at or before this one
    while high - row > 1:
        middle = (row + high) // 2
        before = tl.load(chunk_starts + middle) <= item
        row = tl.where(before, middle, row)
        high = tl.where(before, high, middle)
    first_item = tl.load(chunk_starts + row)
    num_chunks = tl.load(chunk_starts + row + 1) - first_item
    length = tl.load(chunk_len)
    context = tl.load(context_lens + row)
    begin = (item - first_item) * length
    end = tl.minimum(begin + length, context)
    lowest = tl.maximum(context - WINDOW, 0)
    if WINDOW > 0:
        begin = tl.maximum(begin, lowest // BLOCK_N * BLOCK_N)

    group, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    head = kv_head * GROUP + group
    stored = (group[:, None] < GROUP) & (dims[None, :] < D)
    of_row = row.to(tl.int64) * (KV_HEADS * GROUP * D) + head[:, None] * D + dims[None, :]
    query = tl.load(q + of_row, stored, 0.0)
    positions = tl.full([BLOCK_G], 0, tl.int32) + context - 1
    table = block_tables + row.to(tl.int64) * table_stride
    peak = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        offsets = kv_offsets(table, first, end, kv_head, KV_HEADS, BLOCK_SIZE, BLOCK_N, D)
        tokens = first + tl.arange(0, BLOCK_N)
        peak, total, acc = attend_tile(
            query, k_cache, v_cache, offsets, tokens, lowest, end, positions, peak, total, acc,
            scale, True, WINDOW, SOFTCAP, D, BLOCK_D,
        )  # fmt: skip
    # A chunk outside the window has seen nothing: its sum is 0, its weight 2^-inf.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if num_chunks == 1:
        tl.store(out + of_row, acc.to(out.dtype.element_ty), stored)
    else:
        of_item = item.to(tl.int64) * (KV_HEADS * GROUP) + head
        tl.store(chunk_out + of_item[:, None] * D + dims[None, :], acc, stored)
        tl.store(chunk_lse + of_item, peak + tl.log2(total), group < GROUP)


@triton.jit
def _combine_kernel(
    chunk_out, chunk_lse, chunk_starts, out,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Weigh the chunks of one query head by the sums of their softmax."""
    row, head = tl.program_id(0), tl.program_id(1)
    first, end = tl.load(chunk_starts + row), tl.load(chunk_starts + row + 1)
    if end - first == 1:
        return  # written by the decode kernel
    dims = tl.arange(0, BLOCK_D)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, BLOCK_C):
        chunks = start + tl.arange(0, BLOCK_C)
        at = chunks.to(tl.int64) * HEADS + head
        lse = tl.load(chunk_lse + at, chunks < end, float("-inf"))
        loaded = (chunks[:, None] < end) & (dims[None, :] < D)
        parts = tl.load(chunk_out + at[:, None] * D + dims[None, :], loaded, 0.0)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(lse - shift)
        fade = tl.exp2(peak - shift)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(weights[:, None] * parts, 0)
        peak = new_peak
    acc = acc / tl.where(total > 0, total, 1.0)  # a row without context has no chunks
    at_out = (row.to(tl.int64) * HEADS + head) * D + dims
    tl.store(out + at_out, acc.to(out.dtype.element_ty), dims < D)


def plan_decodes(inputs: AttentionInputs, target: int) -> DecodePlan:
    """Chunks of equal length, about `target` of them if the contexts are long enough."""
    context_lens, num_decodes = inputs.context_lens, inputs.num_decodes
    chunk_starts = context_lens.new_empty(num_decodes + 1)
    chunk_len = context_lens.new_empty(1)
    if num_decodes > 0:
        _plan_kernel[(1,)](
            context_lens,
            chunk_starts,
            chunk_len,
            num_decodes,
            target,
            MIN_CHUNK=_MIN_CHUNK,
            BLOCK=1024,
            num_warps=4,
        )
    return DecodePlan(num_decodes, num_decodes + target, chunk_starts, chunk_len)


def decode(
    q: Tensor,
    cache: KVCache,
    inputs: AttentionInputs,
    plan: DecodePlan,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: Tensor,
) -> None:
    """Attention of the first plan.num_decodes requests, into out [T, H, D]; cf. `attend`."""
    kv_heads, head_dim, heads = cache.spec.num_kv_heads, cache.spec.head_dim, q.shape[1]
    rows, group = plan.num_decodes, heads // kv_heads
    block_d = max(triton.next_power_of_2(head_dim), 16)
    # Tiles of keys of 16 KiB; in float32, which is for tests, there are no tensor cores.
    block_n = 16 if q.itemsize == 4 else min(64, 8192 // block_d)
    chunk_out = q.new_empty(plan.max_chunks, heads, head_dim, dtype=torch.float32)
    chunk_lse = q.new_empty(plan.max_chunks, heads, dtype=torch.float32)
    _decode_kernel[(plan.max_chunks, kv_heads)](
        q,
        cache.keys,
        cache.values,
        out,
        chunk_out,
        chunk_lse,
        plan.chunk_starts,
        plan.chunk_len,
        inputs.context_lens,
        inputs.block_tables,
        inputs.block_tables.stride(0),
        rows,
        score_unit(scale, softcap),
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        KV_HEADS=kv_heads,
        GROUP=group,
        BLOCK_G=max(triton.next_power_of_2(group), 16),
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_SIZE=cache.spec.block_size,
        BLOCK_N=block_n,
        num_warps=4,
        num_stages=STAGES,
    )
    _combine_kernel[(rows, heads)](
        chunk_out,
        chunk_lse,
        plan.chunk_starts,
        out,
        HEADS=heads,
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_C=16,
        num_warps=4,
    )
