"""Products of the linear layers by Triton, in tiles of one shape: where cuBLAS does not serve.

cuBLAS chooses among kernels by the number of rows, and they add up in different orders. Here every
row is multiplied alike, whoever shares its step.
"""

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from kernels.quantization import Quantization
from kernels.types import Linear


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x, weight, bias, out, num_rows,
    HAS_BIAS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of rows for one of outputs. Neighbours share the weights' tile, which is larger."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_out = rows < num_rows, outs < OUTS
    at_x = x + rows.to(tl.int64)[:, None] * INS
    at_weight = weight + outs.to(tl.int64)[:, None] * INS
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, INS, BLOCK_K):
        ins = first + tl.arange(0, BLOCK_K)
        is_in = ins < INS
        left = tl.load(at_x + ins[None, :], is_row[:, None] & is_in[None, :], 0.0)
        right = tl.load(at_weight + ins[None, :], is_out[:, None] & is_in[None, :], 0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + outs, is_out, 0.0).to(tl.float32)[None, :]
    at_out = out + rows.to(tl.int64)[:, None] * OUTS + outs[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), is_row[:, None] & is_out[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in] @ weight [out, in].T + bias [out], each row by the same operations."""
    x = x.contiguous()
    rows, (outs, ins) = x.shape[0], weight.shape
    out = x.new_empty(rows, outs)
    exact = x.itemsize == 4  # for tests: there are no tensor cores
    block_m, block_n, block_k = (16, 32, 32) if exact else (64, 128, 64)
    if rows > 0:
        _linear_kernel[(triton.cdiv(rows, block_m), triton.cdiv(outs, block_n))](
            x,
            weight,
            weight if bias is None else bias,
            out,
            rows,
            HAS_BIAS=bias is not None,
            OUTS=outs,
            INS=ins,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            num_warps=4,
            num_stages=4,
        )
    return out


def pack_linear(
    weight: Tensor, bias: Tensor | None, quantization: Quantization | None = None
) -> Linear:
    """As `kernels.reference.pack_linear`, of plain weights."""
    assert quantization is None
    return partial(linear, weight=weight.contiguous(), bias=bias)
