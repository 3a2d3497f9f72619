"""Weights of fewer bits, and linear layers that compute with them in plain torch."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.grouped import GroupedWeight

Quantization = Literal["w8a8", "int4", "fp8"]
GROUP = 32  # inputs that share a scale in int4
_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] as (int8 [out, in], scales float32 [out]), symmetric per output."""
    weight = weight.float()
    scales = weight.abs().amax(-1).clamp(min=1e-20) / 127
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def quantize_int4(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """weight [out, in] as (uint8 0 .. 15 [out, in], scales bfloat16 [out, in / group]).

    A value is (q - 8) * scale. The scale maps the group's largest magnitude to -8, the one level
    without a counterpart, as in llama.cpp's Q4_0.
    """
    groups = weight.float().unflatten(-1, (-1, group))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scales = (extreme / -8).bfloat16()
    divisor = scales.float().masked_fill(scales == 0, 1.0)
    levels = (groups / divisor).round_().add_(8).clamp_(0, 15)
    return levels.to(torch.uint8).flatten(-2), scales.squeeze(-1)


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [out, in] as (float8_e4m3fn [out, in], scales float32 [out]), symmetric per output."""
    weight = weight.float()
    scales = weight.abs().amax(-1).clamp(min=1e-20) / _FP8_MAX
    return (weight / scales[:, None]).clamp_(-_FP8_MAX, _FP8_MAX).to(_FP8), scales


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
