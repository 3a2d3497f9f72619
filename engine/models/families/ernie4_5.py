"""ERNIE 4.5 (Baidu, 2025): rotary pairs side by side, biases everywhere or nowhere."""

from dataclasses import replace

from transformers import PreTrainedConfig

from engine.models.config import ModelConfig, dense_config, gated_mlp


def config(hf: PreTrainedConfig) -> ModelConfig:
    bias = bool(hf.use_bias)
    mlp = replace(gated_mlp(hf), bias=bias)
    return dense_config(hf, mlp=mlp, interleaved=True, qkv_bias=bias, output_bias=bias)
