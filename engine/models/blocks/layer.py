"""A transformer layer: attention and MLP, each behind a norm; the residual runs beside them."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from engine.models.blocks.attention import AttentionConfig
from engine.models.blocks.linear import BuildContext
from engine.models.blocks.norm import Norm
from kernels.types import AttentionInputs, KVCache


class MlpConfig(Protocol):
    """What a family says of a layer's MLP; a new kind brings a configuration of its own."""

    def check_divisible(self, num_ranks: int) -> None:
        """Raises ValueError when it cannot be split over so many ranks."""

    def build(self, context: BuildContext) -> nn.Module:
        """From [T, hidden] to [T, hidden]."""


@dataclass(frozen=True)
class LayerConfig:
    """A family whose layers are built otherwise has a subclass with another `build`."""

    attention: AttentionConfig
    mlp: MlpConfig

    def check_divisible(self, num_ranks: int) -> None:
        self.attention.check_divisible(num_ranks)
        self.mlp.check_divisible(num_ranks)

    def build(self, context: BuildContext) -> nn.Module:
        return Layer(self, context)


class Layer(nn.Module):
    def __init__(self, config: LayerConfig, context: BuildContext) -> None:
        super().__init__()
        self._ops = context.ops
        self._eps = context.rms_eps
        self.input_layernorm = Norm(context.hidden_size)
        self.self_attn = config.attention.build(context)
        self.post_attention_layernorm = Norm(context.hidden_size)
        self.mlp = config.mlp.build(context)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        cos_sin: Tensor,
        cache: KVCache,
        inputs: AttentionInputs,
    ) -> tuple[Tensor, Tensor]:
        """x is what the layer before adds to the residual; the first layer has none yet."""
        norm = self.input_layernorm.weight
        if residual is None:
            x, residual = self._ops.rms_norm(x, norm, self._eps), x
        else:
            x, residual = self._ops.add_rms_norm(x, residual, norm, self._eps)
        x = self.self_attn(x, positions, cos_sin, cache, inputs)
        norm = self.post_attention_layernorm.weight
        x, residual = self._ops.add_rms_norm(x, residual, norm, self._eps)
        return self.mlp(x), residual
