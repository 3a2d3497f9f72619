"""Attention of prompt chunks: tiles of queries over tiles of keys.

Finding a tile's request by binary search over `query_starts` is after vLLM's unified Triton kernel.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.attention_tile import STAGES, as_computed, attend_tile, kv_offsets, score_unit
from kernels.cuda.launch import launch, next_power_of_2
from kernels.types import AttentionInputs, KVCache


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
    queries = as_computed(tl.load(q + at[:, None] + dims[None, :], stored, 0.0), k_cache)
    positions = context - num_queries + query
    first_position = context - num_queries + first_query
    last_position = tl.minimum(first_position + TILE - 1, context - 1)

    # Tiles of keys that all queries see need no mask: full_begin .. full_end.
    lowest = tl.maximum(first_position - WINDOW + 1, 0)
    begin = 0
    full_begin = 0
    if WINDOW > 0:
        begin = lowest // BLOCK_N * BLOCK_N
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
            offsets = kv_offsets(table, first, end, kv_head, KV_HEADS, BLOCK_SIZE, BLOCK_N, D)
            peak, total, acc = attend_tile(
                queries, k_cache, v_cache, offsets, first + tl.arange(0, BLOCK_N), lowest, end,
                positions, peak, total, acc, scale, True, WINDOW, SOFTCAP, D, BLOCK_D,
            )  # fmt: skip
    for first in range(full_begin, full_end, BLOCK_N):
        offsets = kv_offsets(table, first, end, kv_head, KV_HEADS, BLOCK_SIZE, BLOCK_N, D)
        peak, total, acc = attend_tile(
            queries, k_cache, v_cache, offsets, first + tl.arange(0, BLOCK_N), lowest, end,
            positions, peak, total, acc, scale, False, WINDOW, SOFTCAP, D, BLOCK_D,
        )  # fmt: skip
    for first in range(full_end, end, BLOCK_N):
        offsets = kv_offsets(table, first, end, kv_head, KV_HEADS, BLOCK_SIZE, BLOCK_N, D)
        peak, total, acc = attend_tile(
            queries, k_cache, v_cache, offsets, first + tl.arange(0, BLOCK_N), lowest, end,
            positions, peak, total, acc, scale, True, WINDOW, SOFTCAP, D, BLOCK_D,
        )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + at[:, None] + dims[None, :], acc.to(out.dtype.element_ty), stored)


def prompts(
    q: Tensor,
    cache: KVCache,
    inputs: AttentionInputs,
    scale: float,
    window: int | None,
    softcap: float | None,
    out: Tensor,
    fuse: bool = True,
) -> None:
    """Attention of the requests that are not decodes, into out [T, H, D]; cf. `attend`.

    Args:
        fuse: whether the compiler may round a product and a sum once. It does where no mask is in
            between, so that what a query gets depends on which others are in its tile.
    """
    kv_heads, head_dim, first_row = (
        cache.spec.num_kv_heads,
        cache.spec.head_dim,
        inputs.decodes.rows,
    )
    num_tokens, heads, _ = q.shape
    rows, group = inputs.context_lens.shape[0] - first_row, heads // kv_heads
    block_d = max(next_power_of_2(head_dim), 16)
    # What fits the registers.
    exact, big = q.itemsize == 4, block_d > 128
    block_m = max(16 if exact else 64 if big else 128, next_power_of_2(group))
    num_tiles = (num_tokens - inputs.decodes.tokens) // (block_m // group) + rows
    launch(
        _prompt_kernel,
        (num_tiles, kv_heads),
        q,
        cache.keys,
        cache.values,
        out,
        inputs.query_starts,
        inputs.context_lens,
        inputs.block_tables,
        inputs.block_tables.stride(0),
        first_row,
        rows,
        score_unit(scale, softcap),
        WINDOW=window or 0,
        SOFTCAP=softcap or 0.0,
        KV_HEADS=kv_heads,
        GROUP=group,
        D=head_dim,
        BLOCK_D=block_d,
        BLOCK_SIZE=cache.spec.block_size,
        BLOCK_M=block_m,
        BLOCK_N=16 if exact else 32 if big else 64,
        num_warps=8 if block_d >= 128 and not exact else 4,
        num_stages=2 if exact else 3 if big else STAGES,
        enable_fp_fusion=fuse,
    )
