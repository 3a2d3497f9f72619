"""Between the qkv projection and attention: head norms, rotary embedding, KV store, fused.

And the store alone, for what else comes before it.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.launch import cdiv, launch, next_power_of_2
from kernels.quantization import FP8_MAX
from kernels.types import KVCache

_BLOCK_HEADS = 8


@triton.jit
def _norm_rotary_store_kernel(
    qkv, q_norm, k_norm, positions, cos_sin, slots, q_out, k_cache, v_cache, eps,
    NORMED: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
    FP8: tl.constexpr, FP8_LIMIT: tl.constexpr,
):  # fmt: skip
    """BLOCK_H of the heads of one token: queries, then keys, then values."""
    HALF: tl.constexpr = D // 2
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_HALF)
    is_query = heads < HEADS
    is_value = heads >= HEADS + KV_HEADS
    real = (heads < HEADS + 2 * KV_HEADS)[:, None] & (dims[None, :] < HALF)

    source = qkv + token * ((HEADS + 2 * KV_HEADS) * D) + heads[:, None] * D + dims[None, :]
    first = tl.load(source, real, 0.0)
    second = tl.load(source + HALF, real, 0.0)
    dtype = first.dtype
    turned_first, turned_second = first, second
    if NORMED:
        # As `reference.rms_norm` rounds: to the model's type before and after the weight.
        exact_first, exact_second = first.to(tl.float32), second.to(tl.float32)
        squares = tl.sum(exact_first * exact_first + exact_second * exact_second, 1)
        scale = tl.rsqrt(squares / D + eps)[:, None]
        weights = tl.where(is_query[:, None], q_norm + dims[None, :], k_norm + dims[None, :])
        weight_first = tl.load(weights, real, 0.0).to(tl.float32)
        weight_second = tl.load(weights + HALF, real, 0.0).to(tl.float32)
        normed_first = (exact_first * scale).to(dtype).to(tl.float32)
        normed_second = (exact_second * scale).to(dtype).to(tl.float32)
        turned_first = (normed_first * weight_first).to(dtype)
        turned_second = (normed_second * weight_second).to(dtype)
    angle = cos_sin + tl.load(positions + token) * D + dims
    cos = tl.load(angle, dims < HALF, 0.0)[None, :]
    sin = tl.load(angle + HALF, dims < HALF, 0.0)[None, :]
    left, right = turned_first.to(tl.float32), turned_second.to(tl.float32)
    turned_first = (left * cos - right * sin).to(dtype)
    turned_second = (right * cos + left * sin).to(dtype)

    at_query = q_out + token * (HEADS * D) + heads[:, None] * D + dims[None, :]
    tl.store(at_query, turned_first, real & is_query[:, None])
    tl.store(at_query + HALF, turned_second, real & is_query[:, None])

    slot = tl.load(slots + token)
    kept = real & (slot >= 0)  # tokens that only pad a step have no slot
    kv_head = tl.where(is_value, heads - HEADS - KV_HEADS, heads - HEADS)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    at = (((block * KV_HEADS + kv_head) * BLOCK_SIZE + offset) * D)[:, None] + dims[None, :]
    if FP8:  # beyond its range there is only NaN
        turned_first = tl.clamp(turned_first.to(tl.float32), -FP8_LIMIT, FP8_LIMIT)
        turned_second = tl.clamp(turned_second.to(tl.float32), -FP8_LIMIT, FP8_LIMIT)
        first = tl.clamp(first.to(tl.float32), -FP8_LIMIT, FP8_LIMIT)
        second = tl.clamp(second.to(tl.float32), -FP8_LIMIT, FP8_LIMIT)
    stored: tl.constexpr = k_cache.dtype.element_ty
    is_key = kept & ((heads >= HEADS) & (heads < HEADS + KV_HEADS))[:, None]
    tl.store(k_cache + at, turned_first.to(stored), is_key)
    tl.store(k_cache + at + HALF, turned_second.to(stored), is_key)
    tl.store(v_cache + at, first.to(stored), kept & is_value[:, None])
    tl.store(v_cache + at + HALF, second.to(stored), kept & is_value[:, None])


def norm_rotary_store(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    positions: Tensor,
    cos_sin: Tensor,
    cache: KVCache,
    slots: Tensor,
) -> Tensor:
    kv_heads, head_dim = cache.spec.num_kv_heads, cache.spec.head_dim
    qkv = qkv.contiguous()
    num_tokens = qkv.shape[0]
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q = qkv.new_empty(num_tokens, heads, head_dim)
    q_norm, k_norm = norms or (qkv, qkv)
    if num_tokens > 0:
        launch(
            _norm_rotary_store_kernel,
            (num_tokens, cdiv(heads + 2 * kv_heads, _BLOCK_HEADS)),
            qkv,
            q_norm,
            k_norm,
            positions,
            cos_sin,
            slots,
            q,
            cache.keys,
            cache.values,
            eps,
            NORMED=norms is not None,
            HEADS=heads,
            KV_HEADS=kv_heads,
            D=head_dim,
            BLOCK_SIZE=cache.spec.block_size,
            BLOCK_H=_BLOCK_HEADS,
            BLOCK_HALF=next_power_of_2(head_dim // 2),
            FP8=cache.keys.itemsize == 1,
            FP8_LIMIT=FP8_MAX,
            num_warps=4,
        )
    return q


@triton.jit
def _store_kernel(
    k, v, k_stride, v_stride, slots, k_cache, v_cache,
    KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr, FP8: tl.constexpr, FP8_LIMIT: tl.constexpr,
):  # fmt: skip
    """The keys and values of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    index = tl.arange(0, BLOCK)
    kept = (index < KV_HEADS * D) & (slot >= 0)
    key = tl.load(k + token * k_stride + index, kept, 0.0)
    value = tl.load(v + token * v_stride + index, kept, 0.0)
    if FP8:  # beyond its range there is only NaN
        key = tl.clamp(key.to(tl.float32), -FP8_LIMIT, FP8_LIMIT)
        value = tl.clamp(value.to(tl.float32), -FP8_LIMIT, FP8_LIMIT)
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    at = ((block * KV_HEADS + index // D) * BLOCK_SIZE + offset) * D + index % D
    tl.store(k_cache + at, key.to(k_cache.dtype.element_ty), kept)
    tl.store(v_cache + at, value.to(v_cache.dtype.element_ty), kept)


def store(k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
    """As `kernels.ops.Attention.store`."""
    num_tokens, kv_heads, head_dim = k.shape
    k, v = (x if x.stride()[1:] == (head_dim, 1) else x.contiguous() for x in (k, v))
    if num_tokens > 0:
        launch(
            _store_kernel,
            (num_tokens,),
            k,
            v,
            k.stride(0),
            v.stride(0),
            slots,
            cache.keys,
            cache.values,
            KV_HEADS=kv_heads,
            D=head_dim,
            BLOCK_SIZE=cache.spec.block_size,
            BLOCK=next_power_of_2(kv_heads * head_dim),
            FP8=cache.keys.itemsize == 1,
            FP8_LIMIT=FP8_MAX,
            num_warps=4,
        )
