"""Qwen2 and Qwen2.5 (Yang et al., 2024): queries, keys and values have a bias."""

from typing import Any

from engine.models.config import ModelConfig, dense_config, sliding_windows


def config(hf: dict[str, Any]) -> ModelConfig:
    return dense_config(hf, windows=qwen_windows(hf), qkv_bias=True)


def qwen_windows(hf: dict[str, Any]) -> list[int | None]:
    """If `use_sliding_window`, the layers from `max_window_layers` on slide."""
    if not hf.get("use_sliding_window", False):
        return []
    return sliding_windows(hf, first=hf.get("max_window_layers", 28))
