"""Weights of fewer bits, and linear layers that compute with them in plain torch."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.grouped import GroupedWeight

Quantization = Literal["w8a8", "int4", "fp8"]
GROUP = 32  # inputs that share a scale in int4
_STEPS = (14.0, 15.0)  # of 15 that int4 has
_VALUES = 1 << 18  # quantized at once: they stay in a processor's caches
_FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(_FP8).max


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] as (int8 [out, in], scales float32 [out]), symmetric per output."""
    weight = weight.float()
    scales = weight.abs().amax(-1).clamp(min=1e-20) / 127
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def quantize_int4(weight: Tensor, group: int = GROUP) -> GroupedWeight:
    """weight [out, in] with scales of bfloat16 and zeros for each group of inputs.

    Of some ranges that levels may stand for, each group takes the one that leaves the least
    squares of errors.
    """
    values = _VALUES if weight.device.type == "cpu" else 64 * _VALUES
    parts = weight.split(max(values // weight.shape[1], 1))
    found = [_int4_groups(part.float().reshape(-1, group).T.contiguous()) for part in parts]
    levels, scales, zeros = (torch.cat(tensors) for tensors in zip(*found, strict=True))
    outputs = len(weight)
    return GroupedWeight(
        levels.view(outputs, -1), 4, scales.view(outputs, -1), zeros.view(outputs, -1)
    )


def _int4_groups(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels [n, group], scales and zeros [n] of values [group, n]: so sums are of registers."""
    lowest, highest = values.amin(0), values.amax(0)
    extreme = torch.where(-lowest > highest, lowest, highest)
    width = highest.clamp(min=0) - lowest.clamp(max=0)
    # As Q4_0 has it, which is so kept; then from end to end in so many steps.
    tries = [extreme / -8, *(width / steps for steps in _STEPS)]
    best, scale, zero = (torch.full_like(lowest, fill) for fill in (-1.0, 0.0, 8.0))
    levels, squares = torch.empty_like(values), torch.empty_like(values)
    for i, step in enumerate(tries):
        step = step.masked_fill(step == 0, 1.0)
        middle = (lowest / -step).round_().clamp_(0, 15) if i else zero
        torch.mul(values, 1 / step, out=levels)
        levels.round_().clamp_(-middle, 15 - middle)
        product = torch.mul(levels, values, out=squares).sum(0)
        fit = product / torch.mul(levels, levels, out=squares).sum(0).clamp_(min=1)
        gain = product * fit  # by so much the squares are less than with nothing but zeros
        is_better = gain > best
        best = torch.where(is_better, gain, best)
        scale, zero = torch.where(is_better, fit, scale), torch.where(is_better, middle, zero)
    scale = scale.bfloat16()
    torch.div(values, scale.float().masked_fill(scale == 0, 1.0), out=levels)
    levels.round_().add_(zero).clamp_(0, 15)
    return levels.T.to(torch.uint8), scale, zero.to(torch.uint8)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] as (float8_e4m3fn [out, in], scales float32 [out]), symmetric per output."""
    weight = weight.float()
    scales = weight.abs().amax(-1).clamp(min=1e-20) / FP8_MAX
    return (weight / scales[:, None]).clamp_(-FP8_MAX, FP8_MAX).to(_FP8), scales


def linear_int8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in], rounded to 8 bits with a scale per row, times a weight of `quantize_int8`."""
    rounded = _round_to_int8(x.float()) @ (weight.float() * scales[:, None]).T
    return (rounded if bias is None else rounded + bias.float()).to(x.dtype)


def linear_fp8(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, in], rounded to e4m3 with a scale per row, times a weight of `quantize_fp8`."""
    rounded, of_rows = quantize_fp8(x)
    exact = (rounded.float() * of_rows[:, None]) @ (weight.float() * scales[:, None]).T
    return (exact if bias is None else exact + bias.float()).to(x.dtype)


def linear_grouped(x: Tensor, weight: GroupedWeight, bias: Tensor | None) -> Tensor:
    """x [T, in], rounded to 8 bits in groups of 32, times a weight."""
    rounded = _round_to_int8(x.float().unflatten(-1, (-1, GROUP))).flatten(-2)
    return F.linear(rounded, weight.values(), None if bias is None else bias.float()).to(x.dtype)


def _round_to_int8(x: Tensor) -> Tensor:
    """x rounded to 255 levels between the extremes of its last dimension."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-20) / 127
    return (x / scale).round() * scale
