"""Llama 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024)."""

from typing import Any

from engine.models.config import ModelConfig, dense_config


def config(hf: dict[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return dense_config(hf, qkv_bias=bias, output_bias=bias)
