"""The KV cache of one rank, layer by layer."""

from dataclasses import dataclass

import torch

from engine.models.config import ModelConfig
from engine.ranks.parallel import TensorParallel
from kernels import Ops
from kernels.types import KVCache, PagedKV


@dataclass(frozen=True)
class KVCacheShape:
    """What a block of it holds."""

    num_layers: int
    spec: PagedKV  # of a layer on this rank

    @classmethod
    def of(
        cls, config: ModelConfig, parallel: TensorParallel, block_size: int, dtype: torch.dtype
    ) -> "KVCacheShape":
        attention = config.layers[0].attention
        kv_heads = max(attention.num_kv_heads // parallel.size, 1)
        spec = PagedKV(block_size, kv_heads, attention.head_dim, dtype)
        return cls(len(config.layers), spec)

    @property
    def block_bytes(self) -> int:
        """What one block takes in all layers."""
        return self.num_layers * self.spec.block_bytes

    def allocate(self, num_blocks: int, ops: Ops, device: torch.device) -> list[KVCache]:
        """One cache per layer, in the layout of the device's attention."""
        return [
            ops.attention.new_cache(num_blocks, self.spec, device) for _ in range(self.num_layers)
        ]
