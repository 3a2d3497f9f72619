"""Llama 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024), and what differs by a word."""

from transformers import PreTrainedConfig

from engine.models.config import ModelConfig, dense_config, sliding_windows


def config(hf: PreTrainedConfig) -> ModelConfig:
    return dense_config(hf, qkv_bias=hf.attention_bias, output_bias=hf.attention_bias)


def config_cwm(hf: PreTrainedConfig) -> ModelConfig:
    """The Code World Model (Meta, 2025): some layers slide."""
    return dense_config(hf, windows=sliding_windows(hf, hf.layer_types))


def config_seed_oss(hf: PreTrainedConfig) -> ModelConfig:
    """Seed-OSS (ByteDance, 2025): biases of its own."""
    return dense_config(hf, qkv_bias=hf.attention_bias, output_bias=hf.attention_out_bias)
