"""Norms and the gated activations: one pass over memory each.

Where a product of 8 bits comes next, they round their result for it, in the same pass.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.cuda.launch import cdiv, launch, next_power_of_2
from kernels.quantization import FP8_MAX
from kernels.types import Rounded

# A row of so many outputs of an activation is one program's.
_LONGEST_ROW = 1 << 15


@triton.jit
def store_rounded(value, out, scale_out, columns, inside, LIMIT: tl.constexpr):
    """A row in 8 bits, and the scale that brings it back."""
    exact = value.to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(exact), 0), 1e-20) / LIMIT
    tl.store(scale_out, scale)
    rounded = tl.clamp(exact / scale, -LIMIT, LIMIT)
    tl.store(out + columns, rounded.to(out.dtype.element_ty), inside)


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, out, scales, total_out, x_stride, out_stride, eps,
    HAS_RESIDUAL: tl.constexpr, ROUNDED: tl.constexpr, LIMIT: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    value = tl.load(x + row * x_stride + columns, inside, 0.0)
    if HAS_RESIDUAL:
        # Summed in float32, rounded once, and normed as rounded: what comes back is what is stored.
        other = tl.load(residual + row * out_stride + columns, inside, 0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total_out + row * out_stride + columns, value, inside)
    exact = value.to(tl.float32)
    normed = exact * tl.rsqrt(tl.sum(exact * exact, 0) / N + eps)
    scaled = normed.to(x.dtype.element_ty).to(tl.float32)
    scaled *= tl.load(weight + columns, inside, 0.0).to(tl.float32)
    result = scaled.to(x.dtype.element_ty)
    if ROUNDED:
        store_rounded(result, out + row * out_stride, scales + row, columns, inside, LIMIT)
    else:
        tl.store(out + row * out_stride + columns, result, inside)


def _launch_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor,
    total: Tensor,
    scales: Tensor | None = None,
) -> None:
    size = x.shape[-1]
    block = next_power_of_2(size)
    launch(
        _rms_norm_kernel,
        (x.shape[0],),
        x,
        x if residual is None else residual,
        weight,
        out,
        out if scales is None else scales,
        total,
        x.stride(0),
        out.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None,
        ROUNDED=scales is not None,
        LIMIT=FP8_MAX,
        N=size,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if rows.shape[0] > 0:
        _launch_rms_norm(rows, None, weight, eps, out, out)
    return out.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, residual = x.contiguous(), residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    if x.shape[0] > 0:
        _launch_rms_norm(x, residual, weight, eps, out, total)
    return out, total


def add_rms_norm_rounded(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Rounded, Tensor]:
    x, residual = x.contiguous(), residual.contiguous()
    out, total = Rounded.empty_like(x), torch.empty_like(x)
    if x.shape[0] > 0:
        _launch_rms_norm(x, residual, weight, eps, out.values, total, out.scales)
    return out, total


@triton.jit
def _gate_and_mul_kernel(
    x, out, scales,
    LINEAR: tl.constexpr, CUBIC: tl.constexpr, ROUNDED: tl.constexpr, LIMIT: tl.constexpr,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gates g by g * sigmoid(LINEAR * (g + CUBIC * g^3))."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    gate = tl.load(x + row * (2 * N) + columns, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * (2 * N) + N + columns, inside, 0.0).to(tl.float32)
    z = gate
    if CUBIC != 0:  # no 0 times infinity
        z += CUBIC * gate * gate * gate
    activated = (gate * tl.sigmoid(LINEAR * z)).to(x.dtype.element_ty).to(tl.float32)
    result = (activated * up).to(x.dtype.element_ty)
    if ROUNDED:
        store_rounded(result, out + row * N, scales + row, columns, inside, LIMIT)
    else:
        tl.store(out + row * N + columns, result, inside)


def _gated(x: Tensor, linear: float, cubic: float) -> Tensor:
    x = x.contiguous()
    rows, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, size)
    block = min(next_power_of_2(size), 2048)
    if rows > 0:
        _launch_gate(x, (linear, cubic), out, None, block)
    return out


def _gated_rounded(x: Tensor, linear: float, cubic: float) -> Rounded | Tensor:
    x = x.contiguous()
    rows, size = x.shape[0], x.shape[1] // 2
    block = next_power_of_2(size)
    if block > _LONGEST_ROW:
        return _gated(x, linear, cubic)
    out = Rounded.empty_like(x[:, :size])
    if rows > 0:
        _launch_gate(x, (linear, cubic), out.values, out.scales, block)
    return out


def _launch_gate(
    x: Tensor, gate: tuple[float, float], out: Tensor, scales: Tensor | None, block: int
) -> None:
    rows, size = out.shape
    most = 8 if scales is None else 32
    launch(
        _gate_and_mul_kernel,
        (rows, cdiv(size, block)),
        x,
        out,
        out if scales is None else scales,
        LINEAR=gate[0],
        CUBIC=gate[1],
        ROUNDED=scales is not None,
        LIMIT=FP8_MAX,
        N=size,
        BLOCK=block,
        num_warps=min(max(block // 256, 1), most),
    )


_SILU = 1.0, 0.0
_GELU = 2 * math.sqrt(2 / math.pi), 0.044715


def silu_and_mul(x: Tensor) -> Tensor:
    return _gated(x, *_SILU)


def gelu_and_mul(x: Tensor) -> Tensor:
    return _gated(x, *_GELU)


def silu_and_mul_rounded(x: Tensor) -> Rounded | Tensor:
    return _gated_rounded(x, *_SILU)


def gelu_and_mul_rounded(x: Tensor) -> Rounded | Tensor:
    return _gated_rounded(x, *_GELU)
