"""The numbers of a model whose layers are alike, for floors and kernels."""

from dataclasses import dataclass
from pathlib import Path

from engine.models.blocks.mlp import GatedMlpConfig
from engine.models.config import ModelConfig
from engine.models.registry import read_config


@dataclass(frozen=True)
class DenseShape:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    max_position: int
    qk_norm: bool
    window: int | None
    tied_embeddings: bool


def read_shape(directory: Path) -> DenseShape:
    """Of a checkpoint, or of a directory with nothing but a config.json."""
    config = read_config(directory)
    assert isinstance(config, ModelConfig), "a family of our own blocks"
    layer = config.layers[0]
    attention, mlp = layer.attention, layer.mlp
    assert isinstance(mlp, GatedMlpConfig) and all(own == layer for own in config.layers)
    return DenseShape(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=mlp.intermediate_size,
        num_layers=len(config.layers),
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_kv_heads,
        head_dim=attention.head_dim,
        rms_eps=config.rms_eps,
        max_position=config.max_position,
        qk_norm=attention.qk_norm is not None,
        window=attention.window,
        tied_embeddings=config.tied_embeddings,
    )
