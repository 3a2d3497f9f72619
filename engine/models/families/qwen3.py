"""Qwen3 (Yang et al., 2025): each head's queries and keys are normed."""

from transformers import PreTrainedConfig

from engine.models.config import ModelConfig, dense_config, sliding_windows


def config(hf: PreTrainedConfig) -> ModelConfig:
    bias = hf.attention_bias
    windows = sliding_windows(hf, hf.layer_types)
    return dense_config(hf, windows=windows, qk_norm="of heads", qkv_bias=bias, output_bias=bias)
