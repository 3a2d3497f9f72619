"""Weights of few bits in groups of inputs that share a scale, as many formats have them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

SUPER_GROUP = 256  # inputs that share the floating-point scales of a super-block


@dataclass(frozen=True)
class GroupedWeight:
    """A weight [out, in] whose values are (level - zero) * scale, or level * scale + minimum.

    Groups are of 32, 64 or 128 inputs. In a super-block of 256 inputs the groups, of 16 or 32,
    have whole scales of 8 bits, which are multiplied by a half of the block's, and their minimums
    by another.
    """

    levels: Tensor  # uint8 [out, in]
    bits: int  # of a level: 2, 3, 4, 5, 6 or 8
    scales: Tensor  # [out, groups] float16 or bfloat16; int8 in super-blocks
    zeros: Tensor | None = None  # uint8 [out, groups]; where there are none, the middle level
    minimums: Tensor | None = None  # as scales
    super_scales: Tensor | None = None  # float16 [out, super-blocks]
    super_minimums: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.levels.shape
        return outputs, inputs

    @property
    def group(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    @property
    def layout(self) -> tuple[object, ...]:
        """Weights of the same one can lie below each other."""
        return self.bits, self.group, self.scales.dtype, self.zeros is None, self.minimums is None

    def values(self) -> Tensor:
        """float32 [out, in]."""
        scales, minimums = self.scales.float(), self.minimums
        if self.super_scales is not None:
            groups = SUPER_GROUP // self.group
            scales = scales * self.super_scales.float().repeat_interleave(groups, 1)
            if minimums is not None and self.super_minimums is not None:
                of_blocks = self.super_minimums.float().repeat_interleave(groups, 1)
                minimums = minimums * of_blocks
        levels = self.levels.unflatten(1, (-1, self.group)).float()
        if minimums is not None:
            levels = levels * scales[:, :, None] + minimums.float()[:, :, None]
        else:
            zeros = 1 << (self.bits - 1) if self.zeros is None else self.zeros[:, :, None].float()
            levels = (levels - zeros) * scales[:, :, None]
        return levels.flatten(1)

    def rows(self, order: Tensor | slice) -> "GroupedWeight":
        """Some of the outputs, in this order."""
        return self.with_tensors({name: tensor[order] for name, tensor in self.tensors.items()})

    def narrow(self, dim: int, start: int, end: int) -> "GroupedWeight | None":
        """[start, end) of the outputs (0) or of the inputs; None where that would cut a group."""
        if dim == 0:
            return self.rows(slice(start, end))
        inputs, whole = self.shape[1], self.group if self.super_scales is None else SUPER_GROUP
        if start % whole or end % whole:
            return None

        def cut(tensor: Tensor) -> Tensor:
            entries = tensor.shape[1]
            return tensor[:, start * entries // inputs : end * entries // inputs]

        return self.with_tensors({name: cut(tensor) for name, tensor in self.tensors.items()})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that it has, by their names here."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: dict[str, Tensor]) -> "GroupedWeight":
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes)


def joined(parts: Sequence[GroupedWeight]) -> GroupedWeight:
    """Weights of one layout below each other."""
    if len(parts) == 1:
        return parts[0]
    found = [part.tensors for part in parts]
    return parts[0].with_tensors(
        {name: torch.cat([each[name] for each in found]) for name in found[0]}
    )
