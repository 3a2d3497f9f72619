"""Products of the linear layers that cuBLAS does not serve.

It chooses among kernels by the number of rows, and they add up in different orders: for bits that
do not depend on who shares the step, Triton multiplies in tiles of one shape. Weights of 4 bits are
Triton's as well, with inputs as they are. Weights of 8 bits torch multiplies with inputs rounded,
row by row, to as many.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import reference
from kernels.cuda.launch import cdiv, launch, next_power_of_2
from kernels.quantization import GROUP, Quantization, quantize_fp8, quantize_int4
from kernels.types import FP8_MAX, Linear, Rounded


def pack_linear(
    weight: Tensor,
    bias: Tensor | None,
    quantization: Quantization | None = None,
    deterministic: bool = False,
) -> Linear:
    """As `kernels.reference.pack_linear`; but the 8 bits of a CPU's head stay 16.

    Args:
        deterministic: multiply each row by the same operations, whatever others there are.
    """
    if deterministic:
        assert quantization is None
        return partial(linear, weight=weight.contiguous(), bias=bias)
    outs, ins = weight.shape
    if quantization == "int4":
        if ins % (2 * GROUP):
            raise ValueError(f"quantization: 'int4' needs inputs in multiples of 64, not {ins}")
        grouped = quantize_int4(weight)
        packed, scales, zeros = pack_int4(grouped.levels), grouped.scales, grouped.zeros
        return partial(linear_int4, packed=packed, scales=scales, zeros=zeros, bias=bias)
    if quantization == "fp8" and outs % 16 == ins % 16 == 0:  # as the library demands
        rounded, of_outs = quantize_fp8(weight)
        return LinearFp8(rounded.t(), of_outs[None, :], bias)
    return reference.pack_linear(weight, bias, None)


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
        launch(
            _linear_kernel,
            (cdiv(rows, block_m), cdiv(outs, block_n)),
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


def pack_int4(levels: Tensor) -> Tensor:
    """uint8 0 .. 15 [out, in] as [out, in / 2]: of 64 inputs, the first half in the low bits."""
    low, high = levels.unflatten(-1, (-1, 2, GROUP)).unbind(-2)
    return (low | high << 4).flatten(-2).contiguous()


@triton.jit(do_not_specialize=["num_rows"])
def _int4_kernel(
    x, weight, scales, zeros, bias, out, num_rows,
    HAS_BIAS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of rows for one of outputs, two groups of inputs at a time."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_out = (rows < num_rows)[:, None], outs < OUTS
    lanes = tl.arange(0, GROUP)
    at_x = x + rows.to(tl.int64)[:, None] * INS + lanes[None, :]
    at_weight = weight + outs.to(tl.int64)[:, None] * (INS // 2) + lanes[None, :]
    of_out = outs.to(tl.int64) * (INS // GROUP)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for pair in range(INS // (2 * GROUP)):
        packed = tl.load(at_weight + pair * GROUP, is_out[:, None], 0)
        for half in tl.static_range(2):
            group = 2 * pair + half
            zero = tl.load(zeros + of_out + group, is_out, 0).to(tl.int8)
            levels = ((packed >> (4 * half)) & 15).to(tl.int8) - zero[:, None]
            own = tl.load(at_x + group * GROUP, is_row, 0.0)
            scale = tl.load(scales + of_out + group, is_out, 0.0).to(tl.float32)
            product = tl.dot(own, tl.trans(levels.to(own.dtype)), input_precision="ieee")
            acc += product * scale[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + outs, is_out, 0.0).to(tl.float32)[None, :]
    at_out = out + rows.to(tl.int64)[:, None] * OUTS + outs[None, :]
    tl.store(at_out, acc.to(out.dtype.element_ty), is_row & is_out[None, :])


def linear_int4(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None
) -> Tensor:
    """x [T, in] times a weight of `pack_int4`, summed in float32."""
    x = x.contiguous()
    (rows, ins), outs = x.shape, packed.shape[0]
    out = x.new_empty(rows, outs)
    few = rows <= 16 or x.itemsize == 4  # which is for tests
    block_m, block_n = (16, 32) if few else (64, 128)
    if rows > 0:
        launch(
            _int4_kernel,
            (cdiv(rows, block_m), cdiv(outs, block_n)),
            x,
            packed,
            scales,
            zeros,
            packed if bias is None else bias,
            out,
            rows,
            HAS_BIAS=bias is not None,
            OUTS=outs,
            INS=ins,
            GROUP=GROUP,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
            num_stages=4,
        )
    return out


@triton.jit
def _round_kernel(x, out, scales, N: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr):
    """A row to 8 bits, in two passes over it, the second of which finds it in the cache."""
    row = tl.program_id(0).to(tl.int64)
    peak = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * N + columns, columns < N, 0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.abs(value))
    scale = tl.maximum(tl.max(peak, 0), 1e-20) / LIMIT
    tl.store(scales + row, scale)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        value = tl.load(x + row * N + columns, columns < N, 0.0).to(tl.float32) / scale
        value = tl.clamp(value, -LIMIT, LIMIT).to(out.dtype.element_ty)
        tl.store(out + row * N + columns, value, columns < N)


def round_rows(x: Tensor) -> Rounded:
    """Of x [T, N]."""
    x = x.contiguous()
    (rows, size), out = x.shape, Rounded.empty_like(x)
    block = min(next_power_of_2(size), 4096)
    if rows > 0:
        launch(
            _round_kernel,
            (rows,),
            x,
            out.values,
            out.scales,
            N=size,
            BLOCK=block,
            LIMIT=FP8_MAX,
            num_warps=min(block // 256 or 1, 8),
        )
    return out


@dataclass(frozen=True)
class LinearFp8:
    """x [T, in], its rows rounded to 8 bits, times weight [in, out] with scales [1, out]."""

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    takes_rounded = True

    def __call__(self, x: Tensor | Rounded) -> Tensor:
        rounded = x if isinstance(x, Rounded) else round_rows(x)
        rows, outs = len(rounded.values), self.weight.shape[1]
        if rows == 0:
            return self.weight.new_empty(0, outs, dtype=x.dtype)
        # Rows that are scaled come out in bfloat16 only.
        out = torch._scaled_mm(
            rounded.values,
            self.weight,
            scale_a=rounded.scales,
            scale_b=self.scales,
            out_dtype=torch.bfloat16,
        ).to(x.dtype)
        return out if self.bias is None else out + self.bias
