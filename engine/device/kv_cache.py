"""The KV cache of one rank: a tensor of keys and one of values per layer."""

from dataclasses import dataclass

import torch

from engine.models.config import ModelConfig
from engine.ranks.parallel import TensorParallel
from kernels import Ops
from kernels.reference import KVCache


@dataclass(frozen=True)
class KVCacheShape:
    """What a block of it holds."""

    num_layers: int
    num_kv_heads: int  # of this rank
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, config: ModelConfig, parallel: TensorParallel, block_size: int, dtype: torch.dtype
    ) -> "KVCacheShape":
        attention = config.layers[0].attention
        kv_heads = max(attention.num_kv_heads // parallel.size, 1)
        return cls(len(config.layers), kv_heads, attention.head_dim, block_size, dtype)

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers."""
        elements = self.num_layers * self.num_kv_heads * self.head_dim * self.block_size
        return 2 * elements * self.dtype.itemsize

    def allocate(self, num_blocks: int, ops: Ops, device: torch.device) -> list[KVCache]:
        """One cache per layer, in the layout of the device's ops."""
        return [
            ops.new_kv_cache(
                num_blocks, self.block_size, self.num_kv_heads, self.head_dim, self.dtype, device
            )
            for _ in range(self.num_layers)
        ]
