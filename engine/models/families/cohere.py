"""Cohere's Command R (2024) and Command R7B and A (2025): attention and MLP beside each other.

A layer norm without bias is an RMS norm of what has no mean. What is added to the residual has
none here, since the weights lose theirs when they are loaded. The head is the embedding with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from transformers import PreTrainedConfig

from engine.models.blocks.layer import Layer, LayerConfig, LayerNorms
from engine.models.blocks.linear import BuildContext
from engine.models.blocks.rotary import RopeConfig
from engine.models.config import (
    ModelConfig,
    NotOfOurBlocksError,
    dense_config,
    head_dim_of,
    sliding_windows,
)
from engine.models.rewrite import Rewrite, Rewrites
from kernels.types import AttentionInputs, KVCache


class ParallelLayer(Layer):
    """One norm for attention and MLP, which do not see each other."""

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        cos_sin: Tensor,
        cache: KVCache,
        inputs: AttentionInputs,
    ) -> tuple[Tensor, Tensor]:
        into = self.self_attn, self.mlp
        normed, residual = self._add(x, residual, self._norms.before_attention, *into)
        attended = self.self_attn(normed, positions, cos_sin, cache, inputs)
        _, residual = self._add(attended, residual, None)
        return self.mlp(normed), residual


@dataclass(frozen=True)
class ParallelLayerConfig(LayerConfig):
    def build(self, context: BuildContext) -> nn.Module:
        return ParallelLayer(self, context)


def config(hf: PreTrainedConfig) -> ModelConfig:
    if hf.use_qk_norm:
        raise NotOfOurBlocksError("use_qk_norm")
    return _config(hf, [None] * hf.num_hidden_layers, [])


def config_cohere2(hf: PreTrainedConfig) -> ModelConfig:
    """What sees all tokens knows no positions."""
    windows = sliding_windows(hf, hf.layer_types)
    rope, none = RopeConfig.of(hf, head_dim_of(hf)), RopeConfig.none(head_dim_of(hf))
    return _config(hf, windows, [none if window is None else rope for window in windows])


def _config(
    hf: PreTrainedConfig, windows: Sequence[int | None], ropes: Sequence[RopeConfig]
) -> ModelConfig:
    branch = Rewrite(without_mean_of=0)
    modules = {"embed_tokens": Rewrite(without_mean_of=1), "o_proj": branch, "down_proj": branch}
    model = dense_config(
        hf,
        windows=windows,
        ropes=ropes,
        interleaved=True,
        norms=LayerNorms(before_mlp=None),
        rewrites=Rewrites(modules, head_is_embedding=hf.tie_word_embeddings),
        logit_scale=hf.logit_scale,
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
    )
    layers = [ParallelLayerConfig(own.attention, own.mlp, own.norms) for own in model.layers]
    return replace(model, layers=tuple(layers), tied_embeddings=False)
