"""Grouped-query attention, with normed queries and keys in the models that have it."""

from dataclasses import dataclass
from typing import Literal, TypedDict

from torch import Tensor, nn

from engine.models.blocks.linear import BuildContext, ColumnLinear, RowLinear
from engine.models.blocks.norm import Norm
from engine.models.blocks.rotary import RopeConfig
from engine.models.early import check_split
from engine.models.shape import LayerCache
from kernels.types import AttentionInputs, KVCache, Rounded

QKNorm = Literal["of heads", "of all"]  # each head by itself, or all heads as one


class AttentionOptions(TypedDict, total=False):
    """What `AttentionConfig` has a default for, and layers have alike."""

    qk_norm: QKNorm | None
    qkv_bias: bool
    output_bias: bool
    scale: float | None
    softcap: float | None


@dataclass(frozen=True)
class AttentionConfig:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    window: int | None = None  # a token sees itself and the window - 1 tokens before it
    qk_norm: QKNorm | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    scale: float | None = None  # of scores; default: by the heads' dimension
    softcap: float | None = None  # of scores

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
        self._parallel = context.parallel
        self._kv_shards = kv_shards
        self._scale = config.head_dim**-0.5 if config.scale is None else config.scale
        if config.qk_norm is not None:
            is_of_all = config.qk_norm == "of all"
            self.q_norm = Norm(size if is_of_all else config.head_dim)
            self.k_norm = Norm(kv_size if is_of_all else config.head_dim)

    @property
    def takes_rounded(self) -> bool:
        return self.qkv_proj.takes_rounded

    def forward(
        self,
        x: Tensor | Rounded,
        positions: Tensor,
        cos_sin: Tensor,
        cache: KVCache,
        inputs: AttentionInputs,
    ) -> Tensor:
        """x [T, hidden] -> [T, hidden]; writes the tokens' keys and values."""
        config, ops, qkv = self._config, self._ops, self.qkv_proj(x)
        if config.qk_norm == "of all":
            q, k, v = self._normed(qkv, cache.spec.num_kv_heads)
            q, k = ops.rotary(q, k, positions, cos_sin)
            ops.attention.store(k, v, cache, inputs.slots)
        else:
            norms = (self.q_norm.weight, self.k_norm.weight) if config.qk_norm else None
            q = ops.norm_rotary_store(
                qkv, norms, self._eps, positions, cos_sin, cache, inputs.slots
            )
        attended = ops.attention.attend(
            q, cache, inputs, self._scale, config.window, config.softcap
        )
        return self.o_proj(attended.flatten(1))

    def _normed(self, qkv: Tensor, kv_heads: int) -> list[Tensor]:
        """Queries and keys normed over all heads, and values: each [T, heads, head_dim]."""
        kv_size = kv_heads * self._config.head_dim
        q, k, v = qkv.split([qkv.shape[1] - 2 * kv_size, kv_size, kv_size], dim=1)
        q = self._norm_all(q, self.q_norm, self._parallel.size)
        k = self._norm_all(k, self.k_norm, self._kv_shards)
        return [part.unflatten(1, (-1, self._config.head_dim)) for part in (q, k, v)]

    def _norm_all(self, part: Tensor, norm: Norm, shards: int) -> Tensor:
        """A norm over all ranks' heads, of which `part` [T, size] is this rank's."""
        if self._parallel.size == 1:
            return self._ops.rms_norm(part, norm.weight, self._eps)
        copies = self._parallel.size // shards  # ranks that hold the same
        size, start = part.shape[1], self._parallel.rank // copies * part.shape[1]
        gathered = self._parallel.all_gather(part.contiguous())
        whole = gathered.unflatten(1, (shards, -1))[..., :size].flatten(1)
        return self._ops.rms_norm(whole, norm.weight, self._eps)[:, start : start + size]
