"""The KV cache of one rank: what each layer keeps, and which layers share block tables."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from engine.config import EngineConfig
from engine.models.shape import ModelShape
from engine.ranks.rank_group import RankGroup
from engine.schedule.block_tables import CacheGroup, most_held
from kernels import Ops
from kernels.types import KVCache, PagedKV


@dataclass(frozen=True)
class LayerGroup:
    """Layers that cache alike: a block of theirs is one in each of them."""

    spec: PagedKV  # of a layer on this rank
    window: int | None
    layers: list[int]
    draft_bytes: int = 0  # of a block, in the layers of a draft model that share its tables

    @property
    def block_bytes(self) -> int:
        """What one block takes in all its layers."""
        return len(self.layers) * self.spec.block_bytes + self.draft_bytes


@dataclass(frozen=True)
class KVCacheLayout:
    groups: list[LayerGroup]  # as `ModelShape.cache_groups` has them

    @classmethod
    def of(
        cls,
        shape: ModelShape,
        parallel: RankGroup,
        block_size: int,
        dtype: torch.dtype,
        draft: "KVCacheLayout | None" = None,
    ) -> "KVCacheLayout":
        """
        Args:
            draft: a draft model's, whose layers keep the same tokens in the first group's blocks.
        """
        groups = []
        caches = shape.caches(parallel.size)
        for layers in shape.cache_groups(parallel.size):
            cache = caches[layers[0]]
            spec = PagedKV(block_size, cache.num_kv_heads, cache.head_dim, dtype)
            groups.append(LayerGroup(spec, cache.window, layers))
        if draft is not None:
            groups[0] = replace(groups[0], draft_bytes=draft.num_bytes([1]))
        return cls(groups)

    def num_blocks(self, config: EngineConfig, num_bytes: int) -> list[int]:
        """Of each group: as many as there is memory for, but no more windows than rows can fill."""
        caps = [
            None
            if group.window is None or len(self.groups) == 1
            else config.step_size.rows
            * most_held(group.window, config.step_size.tokens, config.block_size)
            for group in self.groups
        ]
        counts: list[int] = [0] * len(self.groups)
        open_groups = list(range(len(self.groups)))
        while open_groups:
            together = sum(self.groups[i].block_bytes for i in open_groups)
            count = num_bytes // together
            full = [i for i in open_groups if caps[i] is not None and (caps[i] or 0) < count]
            for i in full or open_groups:
                counts[i] = min(count, caps[i] or count)
                num_bytes -= counts[i] * self.groups[i].block_bytes
            open_groups = [i for i in open_groups if i not in (full or open_groups)]
        return counts

    def cache_groups(self, num_blocks: Sequence[int]) -> list[CacheGroup]:
        """What the scheduler knows of the groups."""
        return [
            CacheGroup(count, group.window)
            for group, count in zip(self.groups, num_blocks, strict=True)
        ]

    def num_bytes(self, num_blocks: Sequence[int]) -> int:
        return sum(
            count * group.block_bytes for count, group in zip(num_blocks, self.groups, strict=True)
        )

    def allocate(self, num_blocks: Sequence[int], ops: Ops, device: torch.device) -> list[KVCache]:
        """One cache per layer, in the layout of the device's attention."""
        caches: dict[int, KVCache] = {}
        for group, count in zip(self.groups, num_blocks, strict=True):
            for layer in group.layers:
                caches[layer] = ops.attention.new_cache(count, group.spec, device)
        return [caches[layer] for layer in sorted(caches)]
