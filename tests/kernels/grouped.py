"""Random weights of every layout that `kernels.grouped` has."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.grouped import SUPER_GROUP, GroupedWeight


class Kind(NamedTuple):
    bits: int
    group: int
    scales: torch.dtype  # int8: of super-blocks
    has_minimums: bool = False
    has_zeros: bool = False


_HALF, _BFLOAT16, _SUPER = torch.float16, torch.bfloat16, torch.int8
KINDS = [
    Kind(4, 32, _HALF),  # GGUF's Q4_0
    Kind(4, 32, _HALF, has_minimums=True),  # Q4_1
    Kind(5, 32, _HALF),
    Kind(5, 32, _HALF, has_minimums=True),
    Kind(8, 32, _HALF),
    Kind(2, 16, _SUPER, has_minimums=True),  # Q2_K
    Kind(3, 16, _SUPER),
    Kind(4, 32, _SUPER, has_minimums=True),
    Kind(5, 32, _SUPER, has_minimums=True),
    Kind(6, 16, _SUPER),
    Kind(4, 128, _BFLOAT16),  # compressed-tensors, GPTQ, AWQ
    Kind(4, 64, _BFLOAT16, has_minimums=True),
    Kind(4, 128, _HALF, has_zeros=True),
    Kind(8, 128, _BFLOAT16, has_zeros=True),
    Kind(8, 32, _HALF, has_minimums=True),
    Kind(3, 64, _HALF, has_zeros=True),
]


def random_weight(kind: Kind, outputs: int, inputs: int) -> GroupedWeight:
    """Of values of about 1 / sqrt(inputs)."""
    groups, blocks = (outputs, inputs // kind.group), (outputs, inputs // SUPER_GROUP)
    size = inputs**-0.5
    levels = torch.randint(0, 1 << kind.bits, (outputs, inputs), dtype=torch.uint8)
    step = size * 4 / (1 << kind.bits)
    if kind.scales == torch.int8:
        minimums = of_minimums = None
        lowest = 0 if kind.has_minimums else -128
        if kind.has_minimums:
            minimums = torch.randint(0, 64, groups, dtype=torch.int8)
            of_minimums = (torch.randn(blocks) * size / 32).half()
        return GroupedWeight(
            levels,
            kind.bits,
            torch.randint(lowest, 64, groups, dtype=torch.int8),
            minimums=minimums,
            super_scales=(torch.randn(blocks) * step / 32).half(),
            super_minimums=of_minimums,
        )

    def normal(scale: float) -> Tensor:
        return (torch.randn(groups) * scale).to(kind.scales)

    zeros = torch.randint(0, 1 << kind.bits, groups, dtype=torch.uint8)
    return GroupedWeight(
        levels,
        kind.bits,
        normal(step),
        zeros if kind.has_zeros else None,
        normal(size) if kind.has_minimums else None,
    )
