"""A tile of keys and values of the paged cache, as both attention kernels take it in."""

import triton
import triton.language as tl

_LOG2_E = 1.4426950408889634
LOG2_E = tl.constexpr(_LOG2_E)
# Of the software pipeline. Where a tile lies is read from the block table, in stages of its own, so
# it takes five to load one tile of keys and values while the one before is computed with.
STAGES = 5


def score_unit(scale: float, softcap: float | None) -> float:
    """What the kernels multiply products by: exponents of 2, or of a capped score's sigmoid."""
    return scale * _LOG2_E if softcap is None else 2 * scale / softcap


@triton.jit
def as_computed(q, k_cache):
    """Queries in the type in which products with this cache are computed, and its contents too.

    One instruction makes two numbers of float16 from 8 bits, where bfloat16 takes several for each;
    and float16 has all that they can be.
    """
    computed = q
    if k_cache.dtype.element_ty.primitive_bitwidth == 8 and q.dtype == tl.bfloat16:
        computed = tl.clamp(q.to(tl.float32), -65504.0, 65504.0).to(tl.float16)
    return computed


@triton.jit
def kv_offsets(
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
def attend_tile(
    q, k_cache, v_cache, offsets, tokens, lowest, end, positions, peak, total, acc, scale,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values, taken into the running softmax of the rows at `positions`.

    Nothing is read below `lowest`, the first key that any of them sees, nor from `end` on.
    """
    dims = tl.arange(0, BLOCK_D)
    at = offsets[:, None] + dims[None, :]
    if MASKED or D != BLOCK_D:  # what lies elsewhere may be NaN, which no weight of 0 mends
        loaded = (tokens[:, None] < end) & (dims[None, :] < D)
        if WINDOW > 0:
            loaded = loaded & (tokens[:, None] >= lowest)
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
