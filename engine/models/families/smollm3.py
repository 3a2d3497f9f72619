"""SmolLM3 (Hugging Face, 2025): a Llama of which every fourth layer knows no positions."""

from transformers import PreTrainedConfig

from engine.models.blocks.rotary import RopeConfig
from engine.models.config import ModelConfig, dense_config, head_dim_of, sliding_windows


def config(hf: PreTrainedConfig) -> ModelConfig:
    head_dim, bias = head_dim_of(hf), hf.attention_bias
    rope, none = RopeConfig.of(hf, head_dim), RopeConfig.none(head_dim)
    return dense_config(
        hf,
        ropes=[rope if has_rope else none for has_rope in hf.no_rope_layers],
        windows=sliding_windows(hf, hf.layer_types),
        qkv_bias=bias,
        output_bias=bias,
    )
