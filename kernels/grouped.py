"""Weights of few bits in groups of inputs that share a scale, as many formats have them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import groupby
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

    @property
    def common(self) -> int:
        """Inputs that share a group or a super-block."""
        return self.group if self.super_scales is None else SUPER_GROUP

    def stored(self, order: Tensor | None = None) -> "StoredWeight":
        def rows(ids: Tensor) -> GroupedWeight:
            return self._each(lambda tensor: tensor.index_select(0, ids))

        return StoredWeight(self.shape, rows, order)

    def inputs(self, start: int, end: int) -> "GroupedWeight":
        """[start, end) of the inputs, which cut no group."""

        def cut(tensor: Tensor) -> Tensor:
            entries = tensor.shape[1]
            first, last = (n * entries // self.shape[1] for n in (start, end))
            return tensor[:, first:last]

        return self._each(cut)

    def times(self, factor: float) -> "GroupedWeight":
        """With scales that are rounded anew."""
        of_super = self.super_scales is not None
        names = ("super_scales", "super_minimums") if of_super else ("scales", "minimums")
        own = {name: getattr(self, name) for name in names}
        changes: dict[str, Any] = {
            name: (tensor.float() * factor).to(tensor.dtype)
            for name, tensor in own.items()
            if tensor is not None
        }
        return replace(self, **changes)

    def _each(self, function: Callable[[Tensor], Tensor]) -> "GroupedWeight":
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        changes: dict[str, Any] = {
            name: function(value) for name, value in found.items() if isinstance(value, Tensor)
        }
        return replace(self, **changes)


@dataclass(frozen=True)
class StoredWeight:
    """A grouped weight whose rows are taken from where they are stored when they are wanted."""

    shape: tuple[int, int]
    rows: Callable[[Tensor], GroupedWeight]  # of these outputs
    order: Tensor | None = None  # which input each column is for, where groups have any inputs

    @cached_property
    def first(self) -> GroupedWeight:
        return self.rows(torch.zeros(1, dtype=torch.int64))

    @property
    def layout(self) -> tuple[object, ...]:
        return self.first.layout

    def ordered(self, order: Tensor) -> "StoredWeight":
        """With its outputs in this order, or some of them."""
        shape = len(order), self.shape[1]
        return replace(self, shape=shape, rows=lambda rows: self.rows(order[rows]))

    def narrow(self, dim: int, start: int, end: int) -> "StoredWeight | None":
        """[start, end) of the outputs (0) or of the inputs; None where that would cut a group."""
        outputs, inputs = self.shape
        if dim == 0:
            cut = end - start, inputs
            return replace(self, shape=cut, rows=lambda rows: self.rows(rows + start))
        if (start, end) == (0, inputs):
            return self
        if self.order is not None or start % self.first.common or end % self.first.common:
            return None
        cut = outputs, end - start
        return replace(self, shape=cut, rows=lambda rows: self.rows(rows).inputs(start, end))

    def to(self, device: torch.device) -> "StoredWeight":
        """With its rows there."""
        order = None if self.order is None else self.order.to(device)

        def moved(rows: Tensor) -> GroupedWeight:
            return self.rows(rows)._each(lambda tensor: tensor.to(device))

        return replace(self, rows=moved, order=order)

    def times(self, factor: float) -> "StoredWeight":
        return replace(self, rows=lambda rows: self.rows(rows).times(factor))


def alike(parts: Sequence[Tensor | StoredWeight]) -> Iterator[Tensor | list[StoredWeight]]:
    """Those that can lie below each other: neighbours of one layout, or of values as one."""
    for _, run in groupby(parts, lambda p: p.layout if isinstance(p, StoredWeight) else ()):
        own = list(run)
        stored = [part for part in own if isinstance(part, StoredWeight)]
        yield stored or torch.cat([part for part in own if isinstance(part, Tensor)])


def have_one_order(parts: Sequence[Tensor | StoredWeight]) -> bool:
    """Whether all take their inputs in the same order."""
    orders = [part.order if isinstance(part, StoredWeight) else None for part in parts]
    first = orders[0]
    return all(
        o is first or (o is not None and first is not None and o.equal(first)) for o in orders
    )
