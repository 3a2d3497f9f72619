"""Rotary position embedding (Su et al., "RoFormer", 2021): which frequencies, and their table."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.checkpoint import CheckpointError


@dataclass(frozen=True)
class RopeConfig:
    frequencies: tuple[float, ...]  # of each pair of a head's dimensions, in radians per token
    scale: float = 1.0  # of queries and keys, as YaRN and LongRoPE have it

    @classmethod
    def of(cls, hf: PreTrainedConfig, head_dim: int) -> "RopeConfig":
        """As transformers computes it from `rope_parameters`."""
        rope = hf.rope_parameters
        if rope["rope_type"] == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            return cls(tuple((1.0 / rope["rope_theta"] ** exponents).tolist()))
        if rope["rope_type"] not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise CheckpointError(
                f"config.json: rope_type={rope['rope_type']!r} is not one of {known}"
            )
        frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf, torch.device("cpu"))
        return cls(tuple(frequencies.tolist()), float(scale))


def rotary_table(rope: RopeConfig, max_position: int) -> Tensor:
    """[max_position, head_dim] float32: cosines, then sines, of position times frequency."""
    frequencies = torch.tensor(rope.frequencies, dtype=torch.float32)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * rope.scale
