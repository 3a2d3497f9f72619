"""GLM-4 (Zeng et al., 2024; glm4: 2025): half of each head stands still, pairs side by side."""

from transformers import PreTrainedConfig

from engine.models.blocks.layer import NORMS_BEFORE, LayerNorms
from engine.models.blocks.rotary import RopeConfig
from engine.models.config import ModelConfig, dense_config, head_dim_of
from engine.models.rewrite import Rewrites, parts


def config(hf: PreTrainedConfig) -> ModelConfig:
    return _config(hf, NORMS_BEFORE)


def config_glm4(hf: PreTrainedConfig) -> ModelConfig:
    """With norms behind attention and MLP as well."""
    norms = LayerNorms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm")
    return _config(hf, norms)


def _config(hf: PreTrainedConfig, norms: LayerNorms) -> ModelConfig:
    rope, inner = RopeConfig.of(hf, head_dim_of(hf), is_partial=True), hf.intermediate_size
    return dense_config(
        hf,
        ropes=[rope] * hf.num_hidden_layers,
        interleaved=True,
        norms=norms,
        rewrites=Rewrites(parts("gate_up_proj", {"gate_proj": inner, "up_proj": inner})),
        qkv_bias=hf.attention_bias,
    )
