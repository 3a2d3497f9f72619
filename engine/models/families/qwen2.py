"""Qwen2 and Qwen2.5 (Yang et al., 2024): queries, keys and values have a bias."""

from transformers import PreTrainedConfig

from engine.models.config import ModelConfig, dense_config, sliding_windows


def config(hf: PreTrainedConfig) -> ModelConfig:
    return dense_config(hf, windows=sliding_windows(hf, hf.layer_types), qkv_bias=True)
