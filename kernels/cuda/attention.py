"""Paged attention: split-KV decoding, balanced over the device, and tiles of prompt chunks.

Both kernels pack the query heads that share a key/value head into the rows of one tile
(grouped-query attention), and stream keys and values once with an online softmax, after
FlashAttention-2 (Dao, 2023). Finding a tile's request by binary search over `query_starts` is after
vLLM's unified Triton kernel; nothing about lengths has to come to the host, so that one CUDA graph
serves all lengths.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import KVCache

# Programs per multiprocessor that decoding aims at: as many as its shared memory holds at once.
_PROGRAMS_PER_PROCESSOR = 3
# Of the software pipeline. Where a tile lies is read from the block table, in stages of its own, so
# it takes five to load one tile of keys and values while the one before is computed with.
_STAGES = 5
_MIN_CHUNK = 128  # tokens; below, reading the chunk is cheaper than combining it
_LOG2_E = 1.4426950408889634
LOG2_E = tl.constexpr(_LOG2_E)


@dataclass(frozen=True)
class AttentionPlan:
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


@triton.jit
def _kv_offsets(
    table, first, end, kv_head,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Where in the cache the tokens first .. first + BLOCK_N - 1 of a block table begin."""
    tokens = first + tl.arange(0, BLOCK_N)
    if BLOCK_SIZE % BLOCK_N == 0:  # one block holds the whole tile
        block = tl.load(table + first // BLOCK_SIZE).to(tl.int64)
        inside = first % BLOCK_SIZE + tl.arange(0, BLOCK_N)
        return ((block * KV_HEADS + kv_head) * BLOCK_SIZE + inside) * D
    blocks = tl.load(table + tokens // BLOCK_SIZE, tokens < end, 0).to(tl.int64)
    return ((blocks * KV_HEADS + kv_head) * BLOCK_SIZE + tokens % BLOCK_SIZE) * D


@triton.jit
def _attend(
    q, k_cache, v_cache, offsets, tokens, end, positions, peak, total, acc, scale,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values, taken into the running softmax of the rows at `positions`."""
    dims = tl.arange(0, BLOCK_D)
    at = offsets[:, None] + dims[None, :]
    if MASKED or D != BLOCK_D:  # what lies past a context may be NaN, which no weight of 0 mends
        loaded = (tokens[:, None] < end) & (dims[None, :] < D)
        k = tl.load(k_cache + at, loaded, 0.0).to(q.dtype)
        v = tl.load(v_cache + at, loaded, 0.0).to(q.dtype)
    else:
        k = tl.load(k_cache + at).to(q.dtype)
        v = tl.load(v_cache + at).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP > 0:  # scale has brought them to units of 2 * softcap: tanh(x / 2)
        scores = (2 * tl.sigmoid(scores) - 1) * (SOFTCAP * LOG2_E)
    if MASKED:
        visible = (tokens[None, :] <= positions[:, None]) & (tokens[None, :] < end)
        if WINDOW > 0:
            visible = visible & (positions[:, None] - tokens[None, :] < WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen nothing yet has no peak to subtract.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(peak - shift)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(q.dtype), v, acc * fade[:, None], input_precision="ieee")
    return new_peak, total, acc


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
    if WINDOW > 0:
        begin = tl.maximum(begin, (context - WINDOW) // BLOCK_N * BLOCK_N)

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
        offsets = _kv_offsets(table, first, end, kv_head, KV_HEADS, BLOCK_SIZE, BLOCK_N, D)
        tokens = first + tl.arange(0, BLOCK_N)
        peak, total, acc = _attend(
            query, k_cache, v_cache, offsets, tokens, end, positions, peak, total, acc, scale,
            True, WINDOW, SOFTCAP, D, BLOCK_D,
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


@triton.jit(
    do_not_specialize=["first_row", "num_rows"],
    do_not_specialize_on_alignment=["query_starts"],  # part of a larger tensor
)
def _prompt_kernel(
    q, k_cache, v_cache, out,
    query_starts, context_lens, block_tables, table_stride, first_row, num_rows, scale,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M // GROUP queries of one request, for the query heads of one key/value head."""
    TILE: tl.constexpr = BLOCK_M // GROUP
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    origin = tl.load(query_starts + first_row)
    # Request i begins at tile (queries before it) // TILE + i at the latest: find the last such.
    index, high = tile * 0, num_rows
    while high - index > 1:
        middle = (index + high) // 2
        queries = tl.load(query_starts + first_row + middle) - origin
        before = queries // TILE + middle <= tile
        index = tl.where(before, middle, index)
        high = tl.where(before, high, middle)
    row = first_row + index
    query_start = tl.load(query_starts + row)
    num_queries = tl.load(query_starts + row + 1) - query_start
    first_query = (tile - (query_start - origin) // TILE - index) * TILE
    if first_query >= num_queries:
        return
    context = tl.load(context_lens + row)

    lanes, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    query = first_query + lanes // GROUP
    real = (lanes < TILE * GROUP) & (query < num_queries)
    head = kv_head * GROUP + lanes % GROUP
    at = ((query_start + query).to(tl.int64) * (KV_HEADS * GROUP) + head) * D
    stored = real[:, None] & (dims[None, :] < D)
    queries = tl.load(q + at[:, None] + dims[None, :], stored, 0.0)
    positions = context - num_queries + query
    first_position = context - num_queries + first_query
    last_position = tl.minimum(first_position + TILE - 1, context - 1)

    # Tiles of keys that all queries see need no mask: full_begin .. full_end.
    begin = 0
    full_begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        full_begin = tl.cdiv(tl.maximum(last_position - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
    end = last_position + 1
    full_end = (first_position + 1) // BLOCK_N * BLOCK_N
    full_begin = tl.minimum(full_begin, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    full_end = tl.maximum(full_end, full_begin)

    table = block_tables + row.to(tl.int64) * table_stride
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW > 0:
        for first in range(begin, full_begin, BLOCK_N):
            offsets = _kv_offsets(table, first, end, kv_head, KV_HEADS, BLOCK_SIZE, BLOCK_N, D)
            peak, total, acc = _attend(
                queries, k_cache, v_cache, offsets, first + tl.arange(0, BLOCK_N), end, positions,
                peak, total, acc, scale, True, WINDOW, SOFTCAP, D, BLOCK_D,
            )  # fmt: skip
    for first in range(full_begin, full_end, BLOCK_N):
        offsets = _kv_offsets(table, first, end, kv_head, KV_HEADS, BLOCK_SIZE, BLOCK_N, D)
        peak, total, acc = _attend(
            queries, k_cache, v_cache, offsets, first + tl.arange(0, BLOCK_N), end, positions,
            peak, total, acc, scale, False, WINDOW, SOFTCAP, D, BLOCK_D,
        )  # fmt: skip
    for first in range(full_end, end, BLOCK_N):
        offsets = _kv_offsets(table, first, end, kv_head, KV_HEADS, BLOCK_SIZE, BLOCK_N, D)
        peak, total, acc = _attend(
            queries, k_cache, v_cache, offsets, first + tl.arange(0, BLOCK_N), end, positions,
            peak, total, acc, scale, True, WINDOW, SOFTCAP, D, BLOCK_D,
        )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + at[:, None] + dims[None, :], acc.to(out.dtype.element_ty), stored)


class TritonAttention:
    """`reference.plan_attention` and `reference.paged_attention` by these kernels.

    Args:
        num_processors: multiprocessors of the device, over which decoding spreads.
    """

    def __init__(self, num_processors: int) -> None:
        self._num_programs = num_processors * _PROGRAMS_PER_PROCESSOR

    def plan_attention(
        self,
        query_starts: Tensor,
        context_lens: Tensor,
        num_decodes: int,
        max_query_len: int,
        num_kv_heads: int,
    ) -> AttentionPlan:
        target = triton.cdiv(self._num_programs, num_kv_heads)
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
        return AttentionPlan(num_decodes, num_decodes + target, chunk_starts, chunk_len)

    def paged_attention(
        self,
        q: Tensor,
        kv_cache: KVCache,
        query_starts: Tensor,
        context_lens: Tensor,
        block_tables: Tensor,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        plan: AttentionPlan | None = None,
    ) -> Tensor:
        q = q.contiguous()
        out = torch.empty_like(q)
        num_decodes = 0 if plan is None else plan.num_decodes
        if plan is not None and num_decodes > 0:
            decode(q, kv_cache, context_lens, block_tables, scale, window, softcap, plan, out)
        if context_lens.shape[0] > num_decodes:
            prompts(
                q, kv_cache, query_starts, context_lens, block_tables, scale, window,
                softcap, num_decodes, out,
            )  # fmt: skip
        return out


def _score_unit(scale: float, softcap: float | None) -> float:
    """What the kernels multiply products by: exponents of 2, or of a capped score's sigmoid."""
    return scale * _LOG2_E if softcap is None else 2 * scale / softcap


def decode(
    q: Tensor,
    kv_cache: KVCache,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    plan: AttentionPlan,
    out: Tensor,
) -> None:
    """Attention of the first plan.num_decodes requests, into out [T, H, D]; cf. paged_attention."""
    k_cache, v_cache = kv_cache
    _, kv_heads, block_size, head_dim = k_cache.shape
    heads = q.shape[1]
    rows, group = plan.num_decodes, heads // kv_heads
    block_d = max(triton.next_power_of_2(head_dim), 16)
    # Tiles of keys of 16 KiB; in float32, which is for tests, there are no tensor cores.
    block_n = 16 if q.itemsize == 4 else min(64, 8192 // block_d)
    chunk_out = q.new_empty(plan.max_chunks, heads, head_dim, dtype=torch.float32)
    chunk_lse = q.new_empty(plan.max_chunks, heads, dtype=torch.float32)
    _decode_kernel[(plan.max_chunks, kv_heads)](
        q,
        k_cache,
        v_cache,
        out,
        chunk_out,
        chunk_lse,
        plan.chunk_starts,
        plan.chunk_len,
        context_lens,
        block_tables,
        block_tables.stride(0),
        rows,
        _score_unit(scale, softcap),
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        KV_HEADS=kv_heads,
        GROUP=group,
        BLOCK_G=max(triton.next_power_of_2(group), 16),
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_SIZE=block_size,
        BLOCK_N=block_n,
        num_warps=4,
        num_stages=_STAGES,
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


def prompts(
    q: Tensor,
    kv_cache: KVCache,
    query_starts: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    first_row: int,
    out: Tensor,
) -> None:
    """Attention of the requests from first_row on, into out [T, H, D]; cf. paged_attention.

    The requests before have one query each.
    """
    k_cache, v_cache = kv_cache
    _, kv_heads, block_size, head_dim = k_cache.shape
    num_tokens, heads, _ = q.shape
    rows, group = context_lens.shape[0] - first_row, heads // kv_heads
    block_d = max(triton.next_power_of_2(head_dim), 16)
    # What fits the registers.
    exact, big = q.itemsize == 4, block_d > 128
    block_m = max(16 if exact else 64 if big else 128, triton.next_power_of_2(group))
    num_tiles = (num_tokens - first_row) // (block_m // group) + rows
    _prompt_kernel[(num_tiles, kv_heads)](
        q,
        k_cache,
        v_cache,
        out,
        query_starts,
        context_lens,
        block_tables,
        block_tables.stride(0),
        first_row,
        rows,
        _score_unit(scale, softcap),
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        KV_HEADS=kv_heads,
        GROUP=group,
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_N=16 if exact else 32 if big else 64,
        num_warps=8 if block_d == 128 and not exact else 4,
        num_stages=2 if exact else 3 if big else _STAGES,
    )
