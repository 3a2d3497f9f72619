"""Rotary position embedding (Su et al., "RoFormer", 2021): which frequencies, and their table."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeConfig:
    """The last four apply to kind "llama3" only, `factor` also to "linear"."""

    kind: str  # "default", "linear" or "llama3"
    theta: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


def rotary_table(rope: RopeConfig, head_dim: int, max_position: int) -> Tensor:
    """[max_position, head_dim] float32: cosines, then sines, of position times frequency."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3_frequencies(rope, frequencies)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _llama3_frequencies(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1's: long wavelengths are stretched by `factor`, short ones kept, blended between."""
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return frequencies * (blend + (1 - blend) / rope.factor)
