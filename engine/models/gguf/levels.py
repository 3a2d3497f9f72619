"""Tensors of GGUF files as levels and scales, with the bits that they have.

The layouts of blocks are those of `gguf.quants`.
"""

from collections.abc import Callable

import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

from engine.models.gguf.file import StoredTensor
from kernels.grouped import GroupedWeight, StoredWeight

_Kind = GGMLQuantizationType


def grouped_weight(stored: StoredTensor) -> StoredWeight | None:
    """The same weight; None for kinds that no kernel multiplies as they are."""
    take_apart = KINDS.get(stored.kind)
    if take_apart is None or len(stored.shape) != 2:
        return None
    outputs, inputs = stored.shape
    blocks = torch.from_numpy(stored.rows).unflatten(1, (-1, GGML_QUANT_SIZES[stored.kind][1]))
    return StoredWeight((outputs, inputs), lambda rows: take_apart(blocks.index_select(0, rows)))


def _halves(parts: Tensor) -> Tensor:
    """uint8 [out, blocks, 2 n] as float16 [out, blocks * n]."""
    return parts.contiguous().view(torch.float16).flatten(1)


def _planes(packed: Tensor, bits: int) -> Tensor:
    """Of bytes [..., n] the first bits of all, then the next ones: [..., n * 8 / bits]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
    return ((packed.unsqueeze(-2) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _of_runs(packed: Tensor, bits: int, run: int) -> Tensor:
    """The same for each run of so many bytes."""
    return _planes(packed.unflatten(-1, (-1, run)), bits).flatten(-2)


def _basic(bits: int, has_minimums: bool) -> Callable[[Tensor], GroupedWeight]:
    """Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: a half, or two, and 32 levels; fifth bits before the others."""

    def take_apart(blocks: Tensor) -> GroupedWeight:
        start = 4 if has_minimums else 2
        minimums = _halves(blocks[..., 2:4]) if has_minimums else None
        if bits == 8:
            levels = blocks[..., start:] ^ 128
        elif bits == 4:
            levels = _planes(blocks[..., start:], 4)
        else:
            fifth = blocks[..., start : start + 4].unsqueeze(-1) >> torch.arange(8).byte() & 1
            levels = _planes(blocks[..., start + 4 :], 4) | fifth.flatten(-2) << 4
        return GroupedWeight(levels.flatten(1), bits, _halves(blocks[..., :2]), minimums=minimums)

    return take_apart


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: 12 bytes as 8 scales and 8 minimums."""
    first, second, rest = packed.split(4, -1)
    scales = torch.cat((first & 63, (rest & 15) | (first >> 2 & 48)), -1)
    minimums = torch.cat((second & 63, (rest >> 4) | (second >> 2 & 48)), -1)
    return scales, minimums


def _whole(scales: Tensor) -> Tensor:
    return scales.flatten(1).view(torch.int8)


def _with_minimums(blocks: Tensor, bits: int) -> GroupedWeight:
    """Q4_K and Q5_K."""
    scales, minimums = _six_bit_scales(blocks[..., 4:16])
    levels = _of_runs(blocks[..., -128:], 4, 32)
    if bits == 5:
        levels = levels | _planes(blocks[..., 16:48], 1) << 4
    return GroupedWeight(
        levels.flatten(1),
        bits,
        _whole(scales),
        minimums=_whole(minimums),
        super_scales=_halves(blocks[..., :2]),
        super_minimums=-_halves(blocks[..., 2:4]),
    )


def _q2_k(blocks: Tensor) -> GroupedWeight:
    packed = blocks[..., :16]
    return GroupedWeight(
        _of_runs(blocks[..., 16:80], 2, 32).flatten(1),
        2,
        _whole(packed & 15),
        minimums=_whole(packed >> 4),
        super_scales=_halves(blocks[..., 80:82]),
        super_minimums=-_halves(blocks[..., 82:84]),
    )


def _q3_k(blocks: Tensor) -> GroupedWeight:
    third, packed = _planes(blocks[..., :32], 1), blocks[..., 96:108]
    scales = _planes(packed[..., :8], 4) | _planes(packed[..., 8:], 2) << 4
    return GroupedWeight(
        (_of_runs(blocks[..., 32:96], 2, 32) | third << 2).flatten(1),
        3,
        _whole(scales) - 32,
        super_scales=_halves(blocks[..., 108:]),
    )


def _q6_k(blocks: Tensor) -> GroupedWeight:
    levels = _of_runs(blocks[..., :128], 4, 64) | _of_runs(blocks[..., 128:192], 2, 32) << 4
    return GroupedWeight(
        levels.flatten(1),
        6,
        _whole(blocks[..., 192:208]),
        super_scales=_halves(blocks[..., 208:]),
    )


KINDS: dict[GGMLQuantizationType, Callable[[Tensor], GroupedWeight]] = {
    _Kind.Q4_0: _basic(4, False),
    _Kind.Q4_1: _basic(4, True),
    _Kind.Q5_0: _basic(5, False),
    _Kind.Q5_1: _basic(5, True),
    _Kind.Q8_0: _basic(8, False),
    _Kind.Q2_K: _q2_k,
    _Kind.Q3_K: _q3_k,
    _Kind.Q4_K: lambda blocks: _with_minimums(blocks, 4),
    _Kind.Q5_K: lambda blocks: _with_minimums(blocks, 5),
    _Kind.Q6_K: _q6_k,
}
