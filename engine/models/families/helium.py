"""Helium (Kyutai, 2025): a Llama with rotary pairs side by side."""

from transformers import PreTrainedConfig

from engine.models.config import ModelConfig, dense_config


def config(hf: PreTrainedConfig) -> ModelConfig:
    return dense_config(hf, interleaved=True, qkv_bias=hf.attention_bias)
