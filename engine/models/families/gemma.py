"""Gemma 1 to 3 (Google DeepMind, 2024 and 2025): scaled embeddings, norms of 1 + weight, GELU.

Since Gemma 2 there are four norms in a layer and windows in some; Gemma 2 caps scores and logits,
Gemma 3 norms each head's queries and keys instead.
"""

from dataclasses import astuple

import torch
from transformers import PreTrainedConfig

from engine.models.blocks.attention import QKNorm
from engine.models.blocks.layer import LayerNorms
from engine.models.blocks.rotary import RopeConfig
from engine.models.config import (
    ModelConfig,
    NotOfOurBlocksError,
    dense_config,
    head_dim_of,
    sliding_windows,
)
from engine.models.rewrite import Rewrite, Rewrites

_NORMS = LayerNorms(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def config(hf: PreTrainedConfig) -> ModelConfig:
    return dense_config(
        hf,
        rewrites=_rewrites(hf),
        logit_scale=1 / _scale(hf),
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
    )


def config_gemma2(hf: PreTrainedConfig) -> ModelConfig:
    rope = RopeConfig.of(hf, head_dim_of(hf))
    return _alternating(hf, dict.fromkeys(hf.layer_types, rope))


def config_gemma3(hf: PreTrainedConfig) -> ModelConfig:
    ropes = {kind: RopeConfig.of(hf, head_dim_of(hf), kind) for kind in set(hf.layer_types)}
    return _alternating(hf, ropes, qk_norm="of heads")


def _alternating(
    hf: PreTrainedConfig, ropes: dict[str, RopeConfig], qk_norm: QKNorm | None = None
) -> ModelConfig:
    return dense_config(
        hf,
        windows=sliding_windows(hf, hf.layer_types),
        ropes=[ropes[kind] for kind in hf.layer_types],
        norms=_NORMS,
        rewrites=_rewrites(hf),
        logit_scale=1 / _scale(hf),
        logit_softcap=hf.final_logit_softcapping,
        qk_norm=qk_norm,
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
        scale=hf.query_pre_attn_scalar**-0.5,
        softcap=hf.attn_logit_softcapping,
    )


def _scale(hf: PreTrainedConfig) -> float:
    """Of the embeddings, which are the head as well: there it is taken back."""
    return float(torch.tensor(hf.hidden_size**0.5, dtype=hf.dtype))


def _rewrites(hf: PreTrainedConfig) -> Rewrites:
    if hf.use_bidirectional_attention:
        raise NotOfOurBlocksError("use_bidirectional_attention")
    names = ("input_layernorm", *filter(None, astuple(_NORMS)), "q_norm", "k_norm", "norm")
    return Rewrites(
        dict.fromkeys(names, Rewrite(plus=1))
        | dict.fromkeys(("embed_tokens", "lm_head"), Rewrite(times=_scale(hf)))
    )
