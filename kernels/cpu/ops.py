"""The C++ kernels as ops: the same functions as in `kernels.reference`, which documents them."""

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.cpu.recorder import empty
from kernels.reference import KVCache, StepInputs

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# As declared in the C++ files.
_SIGNATURES = {
    "prepare_step": [
        *[*[c_void_p] * 3, c_int64, c_void_p, c_int64, c_void_p, c_int64, c_int64],
        *[c_void_p] * 5,
    ],
    "embed": [c_void_p, c_int64, c_void_p, c_int64, c_void_p],
    "rms_norm": [c_int, c_void_p, c_int64, c_void_p, c_float, c_void_p, c_int64, c_int64],
    "add_rms_norm": [c_int, *[c_void_p] * 3, c_float, *[c_void_p] * 2, c_int64, c_int64],
    "silu_and_mul": [c_int, c_void_p, c_void_p, c_int64, c_int64],
    "norm_rotary_store": [
        *[c_int, c_int, c_void_p, *[c_int64] * 5, *[c_void_p] * 2, c_float, *[c_void_p] * 6],
    ],
    "paged_attention": [c_int, c_int, *[c_void_p] * 7, *[c_int64] * 7, c_float],
    "sample": [c_int, c_void_p, *[c_int64] * 3, *[c_void_p] * 7],
    "apply_bitmask": [c_void_p, *[c_int64] * 3, c_void_p],
    "top_logprobs": [c_int, c_void_p, *[c_int64] * 4, *[c_void_p] * 4],
}


def declare(library: ctypes.CDLL, signatures: dict[str, list[Any]]) -> None:
    """Tell ctypes the arguments of the library's functions, none of which returns anything."""
    for name, argument_types in signatures.items():
        function = getattr(library, f"manta_{name}")
        function.argtypes = argument_types
        function.restype = None


class CpuOps:
    """The kernels of one loaded library, which expect rows end to end.

    `contiguous()` is for callers with views; what the model passes is returned as it is.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        declare(library, _SIGNATURES)
        self._prepare_step = library.manta_prepare_step
        self._embed = library.manta_embed
        self._rms_norm = library.manta_rms_norm
        self._add_rms_norm = library.manta_add_rms_norm
        self._silu_and_mul = library.manta_silu_and_mul
        self._norm_rotary_store = library.manta_norm_rotary_store
        self._paged_attention = library.manta_paged_attention
        self._sample = library.manta_sample
        self._apply_bitmask = library.manta_apply_bitmask
        self._top_logprobs = library.manta_top_logprobs

    def prepare_step(
        self,
        rows: Tensor,
        starts: Tensor,
        query_starts: Tensor,
        num_tokens: int,
        token_table: Tensor,
        block_table: Tensor,
        block_size: int,
    ) -> StepInputs:
        num_requests, max_blocks = len(rows), block_table.shape[1]
        inputs = StepInputs(
            token_ids=empty((num_tokens,), torch.int64),
            positions=empty((num_tokens,), torch.int64),
            slots=empty((num_tokens,), torch.int64),
            context_lens=empty((num_requests,), torch.int32),
            block_tables=empty((num_requests, max_blocks), torch.int32),
        )
        self._prepare_step(
            rows.data_ptr(),
            starts.data_ptr(),
            query_starts.data_ptr(),
            num_requests,
            token_table.data_ptr(),
            token_table.shape[1],
            block_table.data_ptr(),
            max_blocks,
            block_size,
            inputs.token_ids.data_ptr(),
            inputs.positions.data_ptr(),
            inputs.slots.data_ptr(),
            inputs.context_lens.data_ptr(),
            inputs.block_tables.data_ptr(),
        )
        return inputs

    def embed(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        out = empty((len(token_ids), weight.shape[1]), weight.dtype)
        row_bytes = weight.shape[1] * weight.itemsize
        self._embed(
            token_ids.data_ptr(), len(token_ids), weight.data_ptr(), row_bytes, out.data_ptr()
        )
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        size = x.shape[-1]
        rows = x.reshape(-1, size)
        out = empty(x.shape, x.dtype)
        self._rms_norm(
            DTYPES[x.dtype],
            rows.data_ptr(),
            rows.stride(0),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
            rows.shape[0],
            size,
        )
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        out, total = empty(x.shape, x.dtype), empty(x.shape, x.dtype)
        size = x.shape[-1]
        self._add_rms_norm(
            DTYPES[x.dtype],
            x.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            eps,
            out.data_ptr(),
            total.data_ptr(),
            x.numel() // size,
            size,
        )
        return out, total

    def silu_and_mul(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        rows, doubled = x.shape
        out = empty((rows, doubled // 2), x.dtype)
        self._silu_and_mul(DTYPES[x.dtype], x.data_ptr(), out.data_ptr(), rows, doubled // 2)
        return out

    def norm_rotary_store(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        positions: Tensor,
        cos_sin: Tensor,
        kv_cache: KVCache,
        slots: Tensor,
    ) -> Tensor:
        k_cache, v_cache = kv_cache
        _, kv_heads, block_size, head_dim = k_cache.shape
        qkv = qkv.contiguous()
        tokens = qkv.shape[0]
        heads = qkv.shape[1] // head_dim - 2 * kv_heads
        q = empty((tokens, heads, head_dim), qkv.dtype)
        q_norm, k_norm = (norm.data_ptr() for norm in norms) if norms else (None, None)
        self._norm_rotary_store(
            DTYPES[qkv.dtype],
            k_cache.dtype == torch.float8_e4m3fn,
            qkv.data_ptr(),
            tokens,
            heads,
            kv_heads,
            head_dim,
            block_size,
            q_norm,
            k_norm,
            eps,
            positions.data_ptr(),
            cos_sin.data_ptr(),
            slots.data_ptr(),
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
        )
        return q

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
        plan: None = None,  # the kernels divide the work themselves
    ) -> Tensor:
        k_cache, v_cache = kv_cache
        _, kv_heads, block_size, head_dim = k_cache.shape
        # Not a whole number of registers, or what models of today hardly want on a CPU.
        if head_dim % 16 != 0 or softcap is not None:
            return reference.paged_attention(
                q, kv_cache, query_starts, context_lens, block_tables, scale, window, softcap
            )
        q = q.contiguous()
        out = empty(q.shape, q.dtype)
        self._paged_attention(
            DTYPES[q.dtype],
            k_cache.dtype == torch.float8_e4m3fn,
            q.data_ptr(),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            query_starts.data_ptr(),
            context_lens.data_ptr(),
            block_tables.data_ptr(),
            out.data_ptr(),
            context_lens.shape[0],
            q.shape[1],
            kv_heads,
            head_dim,
            block_size,
            block_tables.stride(0),
            window or 0,
            scale,
        )
        return out

    def sample(
        self,
        logits: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        min_p: Tensor,
        seeds: Tensor,
        positions: Tensor,
    ) -> Tensor:
        rows, vocab = logits.shape
        tokens = empty((rows,), torch.int64)
        self._sample(
            DTYPES[logits.dtype],
            logits.data_ptr(),
            rows,
            vocab,
            logits.stride(0),
            temperature.data_ptr(),
            top_k.data_ptr(),
            top_p.data_ptr(),
            min_p.data_ptr(),
            seeds.data_ptr(),
            positions.data_ptr(),
            tokens.data_ptr(),
        )
        return tokens

    def apply_bitmask(self, logits: Tensor, bitmask: Tensor) -> None:
        assert logits.dtype == torch.float32 and logits.stride(1) == 1
        bitmask = bitmask.contiguous()
        rows, vocab = logits.shape
        self._apply_bitmask(logits.data_ptr(), rows, vocab, logits.stride(0), bitmask.data_ptr())

    def top_logprobs(
        self, logits: Tensor, token_ids: Tensor, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows, vocab = logits.shape
        ids = empty((rows, 1 + count), torch.int64)
        logprobs = empty((rows, 1 + count), torch.float32)
        ranks = empty((rows,), torch.int64)
        self._top_logprobs(
            DTYPES[logits.dtype],
            logits.data_ptr(),
            rows,
            vocab,
            logits.stride(0),
            count,
            token_ids.data_ptr(),
            ids.data_ptr(),
            logprobs.data_ptr(),
            ranks.data_ptr(),
        )
        return ids, logprobs, ranks
