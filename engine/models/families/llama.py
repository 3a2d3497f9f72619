"""Llama 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024)."""

from transformers import PreTrainedConfig

from engine.models.config import ModelConfig, dense_config


def config(hf: PreTrainedConfig) -> ModelConfig:
    return dense_config(hf, qkv_bias=hf.attention_bias, output_bias=hf.attention_bias)
