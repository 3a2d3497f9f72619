"""Norms and the gated activations: one pass over memory each."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, out, total_out, x_stride, out_stride, eps,
    HAS_RESIDUAL: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr,
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
    tl.store(out + row * out_stride + columns, scaled.to(out.dtype.element_ty), inside)


def _launch_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, total: Tensor
) -> None:
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(x.shape[0],)](
        x,
        x if residual is None else residual,
        weight,
        out,
        total,
        x.stride(0),
        out.stride(0),
        eps,
        HAS_RESIDUAL=residual is not None,
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


@triton.jit
def _gate_and_mul_kernel(
    x, out, LINEAR: tl.constexpr, CUBIC: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr
):  # gates g by g * sigmoid(LINEAR * (g + CUBIC * g^3))
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    gate = tl.load(x + row * (2 * N) + columns, inside, 0.0).to(tl.float32)
    up = tl.load(x + row * (2 * N) + N + columns, inside, 0.0).to(tl.float32)
    z = gate
    if CUBIC != 0:  # no 0 times infinity
        z += CUBIC * gate * gate * gate
    activated = (gate * tl.sigmoid(LINEAR * z)).to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + row * N + columns, (activated * up).to(out.dtype.element_ty), inside)


def silu_and_mul(x: Tensor) -> Tensor:
    return _gated(x, 1.0, 0.0)


def gelu_and_mul(x: Tensor) -> Tensor:
    return _gated(x, 2 * math.sqrt(2 / math.pi), 0.044715)


def _gated(x: Tensor, linear: float, cubic: float) -> Tensor:
    x = x.contiguous()
    rows, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, size)
    block = min(triton.next_power_of_2(size), 2048)
    warps = min(max(block // 256, 1), 8)
    if rows > 0:
        _gate_and_mul_kernel[(rows, triton.cdiv(size, block))](
            x, out, LINEAR=linear, CUBIC=cubic, N=size, BLOCK=block, num_warps=warps
        )
    return out
