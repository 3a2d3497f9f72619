"""Weights of fewer bits as levels and scales, where they are in groups: see `dequantize`."""

import torch
from torch import Tensor

from engine.models.weights.dequantize import Parts, unpacked, unpacked_awq
from kernels.grouped import GroupedWeight, StoredWeight

_GROUPS = (128, 64, 32)  # that kernels multiply


def compressed(parts: Parts) -> StoredWeight | None:
    """compressed-tensors: whole numbers, packed or not, with scales of groups or of rows."""
    packed, scales = parts.get("weight_packed"), parts.get("weight_scale")
    zeros = parts.get("weight_zero_point")
    if scales is None or scales.dim() != 2:
        return None
    if packed is None:
        if parts["weight"].dtype != torch.int8 or zeros is not None:
            return None
        return _grouped((parts["weight"].view(torch.uint8) ^ 128), 8, scales)
    if packed.dtype == torch.uint8:  # floats
        return None
    outputs, inputs = (int(n) for n in parts["weight_shape"])
    bits = packed.shape[1] * 32 // inputs
    if zeros is not None:
        zeros = unpacked(zeros.T, bits)[:, :outputs].T
    levels = unpacked(packed, bits)[:, :inputs]
    return _grouped(levels, bits, scales, zeros, parts.get("weight_g_idx"))


def gptq(parts: Parts, bits: int, zeros_are_less_by_one: bool) -> StoredWeight | None:
    zeros = unpacked(parts["qzeros"], bits).T + int(zeros_are_less_by_one)
    levels, scales = unpacked(parts["qweight"].T, bits), parts["scales"].T
    return _grouped(levels, bits, scales, zeros, parts.get("g_idx"))


def awq(parts: Parts) -> StoredWeight | None:
    levels, zeros = unpacked_awq(parts["qweight"]), unpacked_awq(parts["qzeros"])
    return _grouped(levels, 4, parts["scales"].T, zeros)


def _grouped(
    levels: Tensor,
    bits: int,
    scales: Tensor,
    zeros: Tensor | None = None,
    groups: Tensor | None = None,
) -> StoredWeight | None:
    """None where the groups are none that kernels multiply, or their scales not of 16 bits."""
    outputs, inputs = levels.shape
    size, rest = divmod(inputs, scales.shape[1])
    own = next((group for group in _GROUPS if size % group == 0), None)
    if own is None or rest or len(scales) != outputs or bits not in (2, 3, 4, 8):
        return None
    in_order = torch.arange(inputs) // size
    order = None
    if groups is not None and (groups >= 0).all() and not torch.equal(groups.long(), in_order):
        order = torch.argsort(groups, stable=True)
        if not torch.equal(groups[order].long(), in_order):  # groups of several sizes
            return None
        levels = levels[:, order]
    if scales.dtype == torch.float32:
        narrow = [scales.to(dtype) for dtype in (torch.bfloat16, torch.float16)]
        exact = [each for each in narrow if torch.equal(each.float(), scales)]
        if not exact:
            return None
        scales = exact[0]
    each = size // own
    if zeros is not None:
        zeros = zeros.to(torch.uint8).repeat_interleave(each, 1)
    scales = scales.repeat_interleave(each, 1)
    return GroupedWeight(levels.to(torch.uint8), bits, scales, zeros).stored(order)
