"""A transformer layer: attention and MLP between norms; the residual runs beside them."""

from dataclasses import astuple, dataclass
from typing import Any, Protocol

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
class LayerNorms:
    """What checkpoints call a layer's norms, those that it has."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


NORMS_BEFORE = LayerNorms()
NORMS_AFTER = LayerNorms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


@dataclass(frozen=True)
class LayerConfig:
    """A family whose layers are built otherwise has a subclass with another `build`."""

    attention: AttentionConfig
    mlp: MlpConfig
    norms: LayerNorms = NORMS_BEFORE

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
        self.self_attn = config.attention.build(context)
        self.mlp = config.mlp.build(context)
        self._norms = config.norms
        names = [name for name in astuple(config.norms) if name is not None]
        for name in names:
            self.add_module(name, Norm(context.hidden_size))
        self._any_norm = names[0]

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
        norms = self._norms
        x, residual = self._add(x, residual, norms.before_attention, self.self_attn)
        x = self.self_attn(x, positions, cos_sin, cache, inputs)
        x = self._normed(x, norms.after_attention)
        x, residual = self._add(x, residual, norms.before_mlp, self.mlp)
        x = self._normed(self.mlp(x), norms.after_mlp)
        return x, residual

    def _add(
        self, x: Tensor, residual: Tensor | None, norm: str | None, *into: nn.Module
    ) -> tuple[Any, Tensor]:
        """(what comes next, residual): the latter with x, and normed where there is a norm.

        Args:
            into: what alone reads the former, which is rounded if all of them would do so.
        """
        if residual is None:
            return self._normed(x, norm), x
        weight = self._weight(norm or self._any_norm)  # the sum alone is no kernel
        rounding = self._ops.rounding
        if rounding and norm and into and all(getattr(own, "takes_rounded", False) for own in into):
            return rounding.add_rms_norm(x, residual, weight, self._eps)
        normed, total = self._ops.add_rms_norm(x, residual, weight, self._eps)
        return total if norm is None else normed, total

    def _normed(self, x: Tensor, norm: str | None) -> Tensor:
        return x if norm is None else self._ops.rms_norm(x, self._weight(norm), self._eps)

    def _weight(self, norm: str) -> Tensor:
        module: Norm = getattr(self, norm)
        return module.weight
