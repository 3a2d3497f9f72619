"""The C++ kernels around attention: functions of `kernels.reference`, which documents them."""

import ctypes
import math
from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from kernels.cpu.library import DTYPES, declare
from kernels.cpu.recorder import empty
from kernels.types import StepInputs, StepRows

# As declared in the C++ files.
_SIGNATURES = {
    "prepare_step": [
        *[*[c_void_p] * 3, *[c_int64] * 2, c_void_p, c_int64, c_void_p, *[c_int64] * 4],
        *[c_void_p] * 5,
    ],
    "embed": [c_void_p, c_int64, c_void_p, c_int64, c_void_p],
    "rms_norm": [c_int, c_void_p, c_int64, c_void_p, c_float, c_void_p, c_int64, c_int64],
    "add_rms_norm": [c_int, *[c_void_p] * 3, c_float, *[c_void_p] * 2, c_int64, c_int64],
    "rotary": [c_int, c_void_p, *[c_int64] * 4, *[c_void_p] * 3],
    "gate_and_mul": [c_int, c_void_p, c_void_p, c_int64, c_int64, c_float, c_float],
}
# Gates g * sigmoid(a * (g + b * g^3)): SiLU, and GELU by its approximation with tanh.
_SILU = 1.0, 0.0
_GELU = 2 * math.sqrt(2 / math.pi), 0.044715


class CpuLayers:
    """The kernels of one loaded library, which expect rows end to end.

    `contiguous()` is for callers with views; what the model passes is returned as it is.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        declare(library, _SIGNATURES)
        self._prepare_step = library.manta_prepare_step
        self._embed = library.manta_embed
        self._rms_norm = library.manta_rms_norm
        self._add_rms_norm = library.manta_add_rms_norm
        self._rotary = library.manta_rotary
        self._gate_and_mul = library.manta_gate_and_mul

    def prepare_step(
        self, step: StepRows, token_table: Tensor, block_tables: Tensor, block_size: int
    ) -> StepInputs:
        num_requests, num_tokens = len(step.rows), step.num_tokens
        groups, table_rows, max_blocks = block_tables.shape
        token_ids = empty((num_tokens,), torch.int64)
        positions = empty((num_tokens,), torch.int64)
        slots = empty((groups, num_tokens), torch.int64)
        context_lens = empty((num_requests,), torch.int32)
        tables = empty((groups, num_requests, max_blocks), torch.int32)
        self._prepare_step(
            step.rows.data_ptr(),
            step.starts.data_ptr(),
            step.query_starts.data_ptr(),
            num_requests,
            num_tokens,
            token_table.data_ptr(),
            token_table.shape[1],
            block_tables.data_ptr(),
            groups,
            table_rows,
            max_blocks,
            block_size,
            token_ids.data_ptr(),
            positions.data_ptr(),
            slots.data_ptr(),
            context_lens.data_ptr(),
            tables.data_ptr(),
        )
        return StepInputs.of(step, token_ids, positions, context_lens, tables, slots)

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
        return self._gated(x, *_SILU)

    def gelu_and_mul(self, x: Tensor) -> Tensor:
        return self._gated(x, *_GELU)

    def _gated(self, x: Tensor, linear: float, cubic: float) -> Tensor:
        x = x.contiguous()
        rows, size = x.shape[0], x.shape[1] // 2
        out = empty((rows, size), x.dtype)
        self._gate_and_mul(DTYPES[x.dtype], x.data_ptr(), out.data_ptr(), rows, size, linear, cubic)
        return out

    def rotary(
        self, q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self._rotate(q, positions, cos_sin), self._rotate(k, positions, cos_sin)

    def _rotate(self, x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
        tokens, heads, head_dim = x.shape
        x = x if x.stride()[1:] == (head_dim, 1) else x.contiguous()
        out = empty((tokens, heads, head_dim), x.dtype)
        self._rotary(
            DTYPES[x.dtype],
            x.data_ptr(),
            x.stride(0),
            tokens,
            heads,
            head_dim,
            positions.data_ptr(),
            cos_sin.data_ptr(),
            out.data_ptr(),
        )
        return out
