"""Attention of one query per request, or a few: split-KV decoding, balanced over the device."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.attention_tile import STAGES, as_computed, attend_tile, kv_offsets, score_unit
from kernels.cuda.launch import cdiv, launch, next_power_of_2
from kernels.types import AttentionInputs, KVCache

_MIN_CHUNK = 128  # tokens; below, reading the chunk is cheaper than combining it
_WAVES = 3  # of programs: so many that those that end early leave little undone
# (query, head) pairs in a tile: the least that tensor cores take; and where a request has more.
_NARROW, _WIDE = 16, 64


@dataclass(frozen=True)
class DecodePlan:
    """How the attention of one step is cut up, the same for all layers.

    The context of each of the first `num_decodes` requests, which have few queries each, is cut
    into chunks of `chunk_len` [1] tokens and what is left, its tail, which may be as long. The full
    ones of request i are numbers full_starts[i] .. full_starts[i + 1] - 1, and are computed first;
    the tails follow, the longest first: of request tail_order[0], tail_order[1], … (So few programs
    work while others have nothing left to do.) There are at most `max_chunks`. All int32 on the
    device.
    """

    num_decodes: int
    max_chunks: int
    full_starts: Tensor  # [num_decodes + 1]
    tail_order: Tensor  # [num_decodes]
    chunk_len: Tensor
    arrived: Tensor  # [num_decodes, K]: chunks that are done, while not all of them are


@triton.jit(
    do_not_specialize=["num_rows", "target"],
    do_not_specialize_on_alignment=["full_starts", "tail_order", "chunk_len", "arrived"],
)
def _plan_kernel(
    context_lens, full_starts, tail_order, chunk_len, arrived, num_rows, target,
    MIN_CHUNK: tl.constexpr, ROUND: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([], tl.int64)
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(context_lens + rows, rows < num_rows, 0).to(tl.int64))
    # Whole multiples, so that chunks begin on tile boundaries.
    length = (tl.cdiv(tl.cdiv(total, target), ROUND) * ROUND).to(tl.int32)
    length = tl.maximum(length, MIN_CHUNK)
    tl.store(chunk_len, length)
    tl.store(full_starts, 0)
    before = tl.zeros([], tl.int32)
    for start in range(0, num_rows, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        real = rows < num_rows
        context = tl.load(context_lens + rows, real, 0)
        num_full = tl.maximum(context - 1, 0) // length
        tl.store(full_starts + rows + 1, before + tl.cumsum(num_full, 0), real)
        before += tl.sum(num_full, 0)
        for head in range(KV_HEADS):
            tl.store(arrived + rows * KV_HEADS + head, 0, real)
        tail = context - num_full * length
        place = tl.zeros([BLOCK], tl.int32)  # how many tails go before this one
        for first in range(0, num_rows, STEP):
            others = first + tl.arange(0, STEP)
            other_context = tl.load(context_lens + others, others < num_rows, 0)
            other_tail = other_context - tl.maximum(other_context - 1, 0) // length * length
            other_tail = tl.where(others < num_rows, other_tail, -1)[None, :]
            is_before = (other_tail > tail[:, None]) | (
                (other_tail == tail[:, None]) & (others[None, :] < rows[:, None])
            )
            place += tl.sum(is_before.to(tl.int32), 1)
        tl.store(tail_order + place, rows, real)


@triton.jit
def _combine(
    chunk_out, chunk_lse, first_full, num_full, tail, out, stride,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Weigh the chunks of one query's head, in their order, by the sums of their softmax.

    Pointers are those of the head in chunk 0, `stride` heads before chunk 1, and in the output.
    """
    dims = tl.arange(0, BLOCK_D)
    peak = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, num_full + 1, BLOCK_C):
        chunks = start + tl.arange(0, BLOCK_C)
        real = chunks <= num_full
        at = tl.where(chunks < num_full, first_full + chunks, tail).to(tl.int64) * stride
        # Not from the multiprocessor's own cache: other ones wrote them.
        lse = tl.load(chunk_lse + at, real, float("-inf"), cache_modifier=".cg")
        loaded = real[:, None] & (dims[None, :] < D)
        parts = chunk_out + at[:, None] * D + dims[None, :]
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(lse - shift)
        fade = tl.exp2(peak - shift)
        total = total * fade + tl.sum(weights, 0)
        values = tl.load(parts, loaded, 0.0, cache_modifier=".cg")
        acc = acc * fade + tl.sum(weights[:, None] * values, 0)
        peak = new_peak
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + dims, acc.to(out.dtype.element_ty), dims < D)


@triton.jit(
    do_not_specialize=["num_rows", "longest"],
    # Parts of one tensor, which begin anywhere.
    do_not_specialize_on_alignment=[
        "full_starts",
        "tail_order",
        "chunk_len",
        "arrived",
        "query_starts",
    ],
)
def _decode_kernel(
    q, k_cache, v_cache, out, chunk_out, chunk_lse,
    full_starts, tail_order, chunk_len, arrived,
    query_starts, context_lens, block_tables, table_stride, num_rows, longest, scale,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, SINGLE: tl.constexpr, BLOCK_M: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of one request's context, for BLOCK_M // GROUP of its queries, at most `longest`
    in all, and the query heads of one key/value head.

    SINGLE: each request has one query. Then of its programs that which is done last combines all
    chunks; with more of them, that is more work than one program should have.
    """
    TILE: tl.constexpr = BLOCK_M // GROUP
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    all_full = tl.load(full_starts + num_rows)
    if item >= all_full + num_rows:
        return
    is_tail = item >= all_full
    if is_tail:
        row = tl.load(tail_order + item - all_full)
    else:
        row, high = item * 0, num_rows  # the last row whose chunks begin at or before this one
        while high - row > 1:
            middle = (row + high) // 2
            before = tl.load(full_starts + middle) <= item
            row = tl.where(before, middle, row)
            high = tl.where(before, high, middle)
    first_full = tl.load(full_starts + row)
    num_full = tl.load(full_starts + row + 1) - first_full
    length = tl.load(chunk_len)
    context = tl.load(context_lens + row)
    query_start, num_queries, first_query = row, 1, 0
    if not SINGLE:
        query_start = tl.load(query_starts + row)
        num_queries = tl.load(query_starts + row + 1) - query_start
        first_query = tl.program_id(2) * TILE
        if first_query >= num_queries:
            return
    begin = tl.where(is_tail, num_full, item - first_full) * length
    end = tl.minimum(begin + length, context)
    lowest = tl.maximum(context - num_queries + first_query + 1 - WINDOW, 0)
    if WINDOW > 0:
        begin = tl.maximum(begin, lowest // BLOCK_N * BLOCK_N)

    lanes, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query = first_query + lanes // GROUP
    head = kv_head * GROUP + lanes % GROUP
    real = (lanes < TILE * GROUP) & (query < num_queries)
    stored = real[:, None] & (dims[None, :] < D)
    at = ((query_start + query).to(tl.int64) * (KV_HEADS * GROUP) + head) * D
    at = at[:, None] + dims[None, :]
    if not SINGLE:  # noqa: SIM102, as the compiler decides it
        if context == 0:  # it pads a recorded step, by any number of queries: zeros
            for first in range(first_query, num_queries, TILE * tl.num_programs(2)):
                mask = stored & (first + lanes[:, None] // GROUP < num_queries)
                step = (first - first_query) * (KV_HEADS * GROUP * D)
                tl.store(out + step + at, tl.zeros([BLOCK_M, BLOCK_D], out.dtype.element_ty), mask)
            return
    queries = as_computed(tl.load(q + at, stored, 0.0), k_cache)
    positions = context - num_queries + query
    table = block_tables + row.to(tl.int64) * table_stride
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_N):
        offsets = kv_offsets(table, first, end, kv_head, KV_HEADS, BLOCK_SIZE, BLOCK_N, D)
        tokens = first + tl.arange(0, BLOCK_N)
        peak, total, acc = attend_tile(
            queries, k_cache, v_cache, offsets, tokens, lowest, end, positions, peak, total, acc,
            scale, True, WINDOW, SOFTCAP, D, BLOCK_D,
        )  # fmt: skip
    # A chunk that is outside the window, or after the query, has shown it nothing: its sum is 0,
    # its weight 2^-inf.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if num_full == 0:
        tl.store(out + at, acc.to(out.dtype.element_ty), stored)
        return
    tail = all_full + row
    of_item = tl.where(is_tail, tail, item).to(tl.int64) * longest
    at_chunk = (of_item + query) * (KV_HEADS * GROUP) + head
    tl.store(chunk_out + at_chunk[:, None] * D + dims[None, :], acc, stored)
    tl.store(chunk_lse + at_chunk, peak + tl.log2(total), real)
    if not SINGLE:
        return
    tl.debug_barrier()  # all of the program have written before it counts as done
    at_count = arrived + row * KV_HEADS + kv_head
    if tl.atomic_add(at_count, 1, sem="acq_rel", scope="gpu") < num_full:
        return
    tl.store(at_count, 0)  # for the next layer
    for index in range(GROUP):
        own_head = kv_head * GROUP + index
        _combine(
            chunk_out + own_head * D, chunk_lse + own_head, first_full, num_full, tail,
            out + (row.to(tl.int64) * (KV_HEADS * GROUP) + own_head) * D,
            KV_HEADS * GROUP, D, BLOCK_D, 16,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_rows", "longest"],
    do_not_specialize_on_alignment=["full_starts", "query_starts"],
)
def _combine_kernel(
    chunk_out, chunk_lse, full_starts, query_starts, out, num_rows, longest,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, j, h): head h of query j of request i, of whose context there are chunks."""
    row, query, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    query_start = tl.load(query_starts + row)
    first_full = tl.load(full_starts + row)
    num_full = tl.load(full_starts + row + 1) - first_full
    if (num_full == 0) | (query >= tl.load(query_starts + row + 1) - query_start):
        return
    own = query * HEADS + head
    _combine(
        chunk_out + own * D, chunk_lse + own,
        first_full, num_full, tl.load(full_starts + num_rows) + row,
        out + ((query_start + query).to(tl.int64) * HEADS + head) * D,
        longest * HEADS, D, BLOCK_D, 16,
    )  # fmt: skip


def plan_decodes(inputs: AttentionInputs, num_programs: int, kv_heads: int) -> DecodePlan:
    """Chunks of equal length for as many programs as run at once, or a few times as many.

    Few contexts are cut so that all of it runs at once.
    """
    context_lens, rows = inputs.context_lens, inputs.decodes.rows
    at_once = max(num_programs // kv_heads, 1)
    target = at_once - rows if 4 * rows <= at_once else _WAVES * at_once
    full_starts, tail_order, chunk_len, arrived = context_lens.new_empty(
        2 * rows + 2 + rows * kv_heads
    ).split([rows + 1, rows, 1, rows * kv_heads])
    if rows > 0:
        launch(
            _plan_kernel,
            (1,),
            context_lens,
            full_starts,
            tail_order,
            chunk_len,
            arrived,
            rows,
            target,
            MIN_CHUNK=_MIN_CHUNK,
            ROUND=64,
            KV_HEADS=kv_heads,
            BLOCK=256,
            STEP=64,
            num_warps=8,
        )
    return DecodePlan(rows, target + rows, full_starts, tail_order, chunk_len, arrived)


def _tile(itemsize: int, group: int, longest: int, block_d: int) -> tuple[int, int, bool]:
    """Queries, times heads, and keys of a tile, and whether a narrow one has all of a request's.

    Tiles of keys are of 16 KiB; in float32, which is for tests, there are no tensor cores.
    """
    block_n = 16 if itemsize == 4 else min(64, 8192 // block_d)
    narrow = max(next_power_of_2(group), _NARROW)
    fits = longest * group <= narrow or itemsize == 4
    return narrow if fits else max(narrow, _WIDE), block_n, fits


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
    rows, group, longest = plan.num_decodes, heads // kv_heads, inputs.decodes.longest
    block_d = max(next_power_of_2(head_dim), 16)
    block_m, block_n, fits = _tile(q.itemsize, group, longest, block_d)
    num_tiles = cdiv(longest, block_m // group)
    parts = (plan.max_chunks, longest, heads)
    chunk_out = q.new_empty(*parts, head_dim, dtype=torch.float32)
    chunk_lse = q.new_empty(*parts, dtype=torch.float32)
    launch(
        _decode_kernel,
        (kv_heads, plan.max_chunks, num_tiles),
        q,
        cache.keys,
        cache.values,
        out,
        chunk_out,
        chunk_lse,
        plan.full_starts,
        plan.tail_order,
        plan.chunk_len,
        plan.arrived,
        inputs.query_starts,
        inputs.context_lens,
        inputs.block_tables,
        inputs.block_tables.stride(0),
        rows,
        longest,
        score_unit(scale, softcap),
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        KV_HEADS=kv_heads,
        GROUP=group,
        SINGLE=longest == 1,
        BLOCK_M=block_m,
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_SIZE=cache.spec.block_size,
        BLOCK_N=block_n,
        num_warps=4 if fits else 8,
        num_stages=STAGES if fits or block_d <= 128 else 3,
    )
    if longest > 1:
        _launch_combine(chunk_out, chunk_lse, plan, inputs, out)


def _launch_combine(
    chunk_out: Tensor, chunk_lse: Tensor, plan: DecodePlan, inputs: AttentionInputs, out: Tensor
) -> None:
    """The parts of requests of several queries, [chunks, queries, H, D], into out [T, H, D]."""
    _, longest, heads, head_dim = chunk_out.shape
    rows = plan.num_decodes
    launch(
        _combine_kernel,
        (rows, longest, heads),
        chunk_out,
        chunk_lse,
        plan.full_starts,
        inputs.query_starts,
        out,
        rows,
        longest,
        HEADS=heads,
        D=head_dim,
        BLOCK_D=max(next_power_of_2(head_dim), 16),
    )
