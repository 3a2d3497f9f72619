"""Grouped-query attention, with normed queries and keys in the models that have it."""

from dataclasses import dataclass

from torch import Tensor, nn

from engine.models.blocks.linear import BuildContext, ColumnLinear, RowLinear
from engine.models.blocks.norm import Norm
from engine.models.blocks.rotary import RopeConfig
from engine.models.shape import LayerCache
from kernels.types import AttentionInputs, KVCache


@dataclass(frozen=True)
class AttentionConfig:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False

    def cache(self, num_ranks: int) -> LayerCache:
        return LayerCache(max(self.num_kv_heads // num_ranks, 1), self.head_dim, self.window)

    def check_divisible(self, num_ranks: int) -> None:
        """Raises ValueError for heads that cannot be split over so many ranks."""
        kv_heads = self.num_kv_heads
        if num_ranks % kv_heads == 0:  # neighbouring ranks share one
            kv_heads = max(kv_heads, num_ranks)
        check_split("attention heads", self.num_heads, num_ranks)
        check_split("key/value heads", kv_heads, num_ranks)

    def build(self, context: BuildContext) -> "Attention":
        return Attention(self, context)


def check_split(name: str, number: int, num_ranks: int) -> None:
    if number % num_ranks:
        raise ValueError(f"the model's {number} {name} cannot be split over {num_ranks} ranks")


class Attention(nn.Module):
    def __init__(self, config: AttentionConfig, context: BuildContext) -> None:
        super().__init__()
        self._ops = context.ops
        self._eps = context.rms_eps
        self._config = config
        size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        kv_shards = min(context.parallel.size, config.num_kv_heads)
        self.qkv_proj = ColumnLinear(
            context,
            {"q_proj": size, "k_proj": kv_size, "v_proj": kv_size},
            context.hidden_size,
            config.qkv_bias,
            shards={"k_proj": kv_shards, "v_proj": kv_shards},
        )
        self.o_proj = RowLinear(context, size, context.hidden_size, config.output_bias)
        self.q_norm = Norm(config.head_dim) if config.qk_norm else None
        self.k_norm = Norm(config.head_dim) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        cache: KVCache,
        inputs: AttentionInputs,
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes the tokens' keys and values."""
        norms = None
        if self.q_norm is not None and self.k_norm is not None:
            norms = self.q_norm.weight, self.k_norm.weight
        q = self._ops.norm_rotary_store(
            self.qkv_proj(x), norms, self._eps, positions, cos_sin, cache, inputs.slots
        )
        config = self._config
        attended = self._ops.attention.attend(
            q, cache, inputs, scale=config.head_dim**-0.5, window=config.window
        )
        return self.o_proj(attended.flatten(1))
