"""Qwen3 (Yang et al., 2025): each head's queries and keys are normed."""

from typing import Any

from engine.models.config import ModelConfig, dense_config
from engine.models.families.qwen2 import qwen_windows


def config(hf: dict[str, Any]) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return dense_config(hf, windows=qwen_windows(hf), qk_norm=True, qkv_bias=bias, output_bias=bias)
