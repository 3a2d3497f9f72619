"""Mistral 7B and what followed (Jiang et al., 2023): all layers slide where there is a window."""

from transformers import PreTrainedConfig

from engine.models.config import ModelConfig, dense_config, sliding_windows


def config(hf: PreTrainedConfig) -> ModelConfig:
    kinds = ["sliding_attention"] * hf.num_hidden_layers  # whatever layer_types says
    return dense_config(hf, windows=sliding_windows(hf, kinds))
