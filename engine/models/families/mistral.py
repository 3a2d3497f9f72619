"""Mistral 7B and what followed (Jiang et al., 2023): all layers slide where there is a window."""

from typing import Any

from engine.models.config import ModelConfig, dense_config, sliding_windows


def config(hf: dict[str, Any]) -> ModelConfig:
    return dense_config(hf, windows=sliding_windows(hf))
