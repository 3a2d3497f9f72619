"""OLMo 2 and 3 (Ai2, 2024 and 2025): norms behind attention and MLP, and over all heads."""

from transformers import PreTrainedConfig

from engine.models.blocks.layer import NORMS_AFTER
from engine.models.blocks.rotary import RopeConfig
from engine.models.config import ModelConfig, dense_config, head_dim_of, sliding_windows


def config_olmo2(hf: PreTrainedConfig) -> ModelConfig:
    bias = hf.attention_bias
    return dense_config(hf, norms=NORMS_AFTER, qk_norm="of all", qkv_bias=bias, output_bias=bias)


def config_olmo3(hf: PreTrainedConfig) -> ModelConfig:
    """Some layers slide, with a rotary embedding of their own."""
    ropes = {kind: RopeConfig.of(hf, head_dim_of(hf), kind) for kind in set(hf.layer_types)}
    return dense_config(
        hf,
        windows=sliding_windows(hf, hf.layer_types),
        ropes=[ropes[kind] for kind in hf.layer_types],
        norms=NORMS_AFTER,
        qk_norm="of all",
        qkv_bias=hf.attention_bias,
        output_bias=hf.attention_bias,
    )
