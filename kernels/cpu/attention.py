"""Paged attention by the C++ kernels, and what comes right before it."""

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.cpu import huge_pages
from kernels.cpu.library import DTYPES, declare
from kernels.cpu.recorder import empty
from kernels.reference import PagedAttention
from kernels.types import AttentionInputs, KVCache

_SIGNATURES = {
    "norm_rotary_store": [
        *[c_int, c_int, c_void_p, *[c_int64] * 5, *[c_void_p] * 2, c_float, *[c_void_p] * 6],
    ],
    "store": [c_int, c_int, *[c_void_p, c_int64] * 2, *[c_int64] * 4, *[c_void_p] * 3],
    "paged_attention": [
        *[c_int, c_int, *[c_void_p] * 7, *[c_int64] * 7, c_float, c_float, c_void_p],
    ],
}


class CpuAttention(PagedAttention):
    """Implements `kernels.ops.Attention`. The kernels divide the work themselves, not by a plan."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__(huge_pages.empty)
        declare(library, _SIGNATURES)
        self._norm_rotary_store = library.manta_norm_rotary_store
        self._store = library.manta_store
        self._paged_attention = library.manta_paged_attention

    def store(self, k: Tensor, v: Tensor, cache: KVCache, slots: Tensor) -> None:
        tokens, kv_heads, head_dim = k.shape
        k, v = (x if x.stride()[1:] == (head_dim, 1) else x.contiguous() for x in (k, v))
        self._store(
            DTYPES[k.dtype],
            cache.spec.dtype == torch.float8_e4m3fn,
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            tokens,
            kv_heads,
            head_dim,
            cache.spec.block_size,
            slots.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
        )

    def attend(
        self,
        q: Tensor,
        cache: KVCache,
        inputs: AttentionInputs,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        spec, block_tables = cache.spec, inputs.block_tables
        if spec.head_dim % 16 != 0:  # not a whole number of registers
            return super().attend(q, cache, inputs, scale, window, softcap, sinks)
        q = q.contiguous()
        out = empty(q.shape, q.dtype)
        self._paged_attention(
            DTYPES[q.dtype],
            spec.dtype == torch.float8_e4m3fn,
            q.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
            inputs.query_starts.data_ptr(),
            inputs.context_lens.data_ptr(),
            block_tables.data_ptr(),
            out.data_ptr(),
            inputs.context_lens.shape[0],
            q.shape[1],
            spec.num_kv_heads,
            spec.head_dim,
            spec.block_size,
            block_tables.stride(0),
            window or 0,
            scale,
            softcap or 0.0,
            None if sinks is None else sinks.data_ptr(),
        )
        return out

    def norm_rotary_store(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        positions: Tensor,
        cos_sin: Tensor,
        cache: KVCache,
        slots: Tensor,
    ) -> Tensor:
        """As `kernels.ops.Ops.norm_rotary_store`."""
        spec = cache.spec
        qkv = qkv.contiguous()
        tokens = qkv.shape[0]
        heads = qkv.shape[1] // spec.head_dim - 2 * spec.num_kv_heads
        q = empty((tokens, heads, spec.head_dim), qkv.dtype)
        q_norm, k_norm = (norm.data_ptr() for norm in norms) if norms else (None, None)
        self._norm_rotary_store(
            DTYPES[qkv.dtype],
            spec.dtype == torch.float8_e4m3fn,
            qkv.data_ptr(),
            tokens,
            heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.block_size,
            q_norm,
            k_norm,
            eps,
            positions.data_ptr(),
            cos_sin.data_ptr(),
            slots.data_ptr(),
            q.data_ptr(),
            cache.keys.data_ptr(),
            cache.values.data_ptr(),
        )
        return q
