"""Weights of fewer bits as floats, from the tensors that formats store of a linear map.

Formats of checkpoints, not of kernels: compressed-tensors, fp8 as DeepSeek and Qwen have it, GPTQ,
AWQ and bitsandbytes. What a function is given are a map's tensors by what follows the map's own
name.
"""

import json
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from engine.checkpoint.files import CheckpointError

Parts = Mapping[str, Tensor]
# Values of four bits with one of mantissa, the sign in front.
_FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
# Where AWQ has each of the eight values of a word.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def scaled(parts: Parts, block: Sequence[int] | None = None) -> Tensor:
    """compressed-tensors and fp8: values times scales, of all, of rows, of groups or of blocks.

    Args:
        block: (outputs, inputs) that share a scale, where it is so; the last may have fewer.
    """
    scale = parts.get("weight_scale", parts.get("weight_scale_inv"))
    if scale is None:
        raise CheckpointError(f"there are no scales beside {sorted(parts)}")
    packed, zeros = parts.get("weight_packed"), parts.get("weight_zero_point")
    if packed is None:
        values = parts["weight"].float()
    elif packed.dtype == torch.uint8:
        values = _fp4(packed)
    else:
        shape = [int(n) for n in parts["weight_shape"]]
        bits = packed.shape[1] * 32 // shape[1]
        values = unpacked(packed, bits)[:, : shape[1]].float() - (1 << (bits - 1))
        if zeros is not None:  # packed too, along the outputs
            zeros = unpacked(zeros.T, bits)[:, : shape[0]].T - (1 << (bits - 1))
    scale = _exponents(scale) if scale.dtype == torch.uint8 else scale.float()
    if "weight_global_scale" in parts:
        scale = scale / parts["weight_global_scale"].float()
    groups = parts.get("weight_g_idx")
    if zeros is not None:
        values = values - _spread(zeros.float(), values, groups)
    if block is not None and scale.dim() == 2:
        rows, columns = block
        scale = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        scale = scale[: values.shape[0], : values.shape[1]]
    return values * _spread(scale, values, groups)


def gptq(parts: Parts, bits: int, zeros_are_less_by_one: bool) -> Tensor:
    words = parts["qweight"]  # [in * bits / 32, out]
    values = unpacked(words.T, bits).float()
    scales = parts["scales"].float().T  # [out, groups]
    zeros = unpacked(parts["qzeros"], bits).T.float() + int(zeros_are_less_by_one)
    groups = parts.get("g_idx")
    return (values - _spread(zeros, values, groups)) * _spread(scales, values, groups)


def awq(parts: Parts) -> Tensor:
    values, zeros = (unpacked_awq(parts[what]).float() for what in ("qweight", "qzeros"))
    scales = parts["scales"].float().T
    return (values - _spread(zeros, values)) * _spread(scales, values)


def bitsandbytes(parts: Parts) -> Tensor:
    """LLM.int8's rows, and 4 bits that stand for the values of a table, by blocks of the whole."""
    stored = parts["weight"]
    if "SCB" in parts:
        return stored.float() * (parts["SCB"].float() / 127)[:, None]
    state = next((part for what, part in parts.items() if "quant_state" in what), None)
    if state is None:
        raise CheckpointError(f"there is no quant_state beside {sorted(parts)}")
    says = json.loads(bytes(state.tolist()))
    largest = parts["weight.absmax"]
    if largest.dtype == torch.uint8:  # which are quantized themselves
        of_blocks = parts["weight.nested_absmax"].repeat_interleave(says["nested_blocksize"])
        codes = parts["weight.nested_quant_map"][largest.int()]
        largest = codes * of_blocks[: len(codes)] + says["nested_offset"]
    pairs = stored.flatten()
    codes = torch.stack((pairs >> 4, pairs & 15), 1).flatten()
    values = parts["weight.quant_map"][codes.int()]
    values *= largest.repeat_interleave(says["blocksize"])[: len(values)]
    return values[: math.prod(says["shape"])].view(says["shape"])


def unpacked_awq(words: Tensor) -> Tensor:
    """int32 [in, words] as values of four bits [words * 8, in]."""
    return unpacked(words, 4).unflatten(1, (-1, 8))[:, :, list(_AWQ_ORDER)].flatten(1).T


def unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 [rows, words] as unsigned values [rows, words * 32 / bits], the lowest bits first."""
    if 32 % bits:
        raise CheckpointError(f"values of {bits} bits are not read")
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)


def _fp4(packed: Tensor) -> Tensor:
    """uint8 [rows, bytes], two values in each, the lower half first."""
    codes = torch.stack((packed & 0xF, packed >> 4), -1).flatten(1).long()
    magnitudes = _FP4[codes & 7]
    return torch.where(codes >= 8, -magnitudes, magnitudes)


def _exponents(stored: Tensor) -> Tensor:
    """Powers of two, as MX formats store them."""
    return torch.exp2(stored.float() - 127)


def _spread(scale: Tensor, values: Tensor, groups: Tensor | None = None) -> Tensor:
    """scale, of fewer entries, for values [out, in]; `groups` names the group of each input."""
    if scale.dim() < 2:
        return scale.reshape(-1, 1)
    rows = -(-values.shape[0] // scale.shape[0])
    scale = scale.repeat_interleave(rows, 0)[: values.shape[0]]
    if groups is not None and (groups >= 0).all():
        return scale[:, groups.long()]
    columns = -(-values.shape[1] // scale.shape[1])
    return scale.repeat_interleave(columns, 1)[:, : values.shape[1]]
