"""One rank's place among others: which share of things is its own, and how they talk.

Tensor parallelism is after Shoeybi et al., "Megatron-LM", 2019.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class RankGroup:
    """Rank `rank` of `size`; `group` is None only where there is nobody to talk to."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def share(self, total: int, shards: int | None = None) -> tuple[int, int]:
        """This rank's [start, end) of `total` things cut into `shards` equal parts.

        With fewer shards than ranks (key/value heads), neighbouring ranks hold the same part.
        """
        shards = self.size if shards is None else shards
        length = -(-total // shards)
        start = min(self.rank * shards // self.size * length, total)
        return start, min(start + length, total)

    def agree_on_minimum(self, value: int) -> int:
        """The smallest of all ranks' values."""
        if self.size == 1:
            return value
        backend = dist.get_backend(self.group)
        smallest = torch.tensor(value, device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=self.group)
        return int(smallest.item())

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's x, in place."""
        if self.size > 1:
            dist.broadcast(x, src=0, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """x [N, M] of every rank, side by side: [N, size * M]."""
        if self.size == 1:
            return x
        parts = x.new_empty(self.size * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(parts, x.contiguous(), group=self.group)
        return parts.view(self.size, *x.shape).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class Ranks:
    """One rank's place in each of the groups that it is in."""

    world: RankGroup = RankGroup()  # all ranks of an engine; rank 0 leads
    tensor: RankGroup = RankGroup()  # those that share every layer
