"""Rotary position embedding (Su et al., "RoFormer", 2021): which frequencies, and their table."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.checkpoint.files import CheckpointError


@dataclass(frozen=True)
class RopeConfig:
    # Of each pair of a head's dimensions, in radians per token; 0: it stands still.
    frequencies: tuple[float, ...]
    scale: float = 1.0  # of what is rotated of queries and keys, as YaRN and LongRoPE have it

    @classmethod
    def none(cls, head_dim: int) -> "RopeConfig":
        return cls((0.0,) * (head_dim // 2))

    @classmethod
    def of(
        cls,
        hf: PreTrainedConfig,
        head_dim: int,
        kind: str | None = None,
        is_partial: bool = False,
    ) -> "RopeConfig":
        """As transformers computes it from `rope_parameters`.

        Args:
            kind: of the layer, where each kind has parameters of its own.
            is_partial: a share of each head may stand still; else that is not looked at.
        """
        rope = hf.rope_parameters if kind is None else hf.rope_parameters[kind]
        if rope["rope_type"] == "default":
            share = rope.get("partial_rotary_factor", 1.0) if is_partial else 1.0
            rotary_dim = int(head_dim * share)
            exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
            frequencies, scale = 1.0 / rope["rope_theta"] ** exponents, 1.0
            return cls._of(frequencies, scale, head_dim, is_partial)
        if rope["rope_type"] not in ROPE_INIT_FUNCTIONS:
            known = ", ".join(["default", *ROPE_INIT_FUNCTIONS])
            raise CheckpointError(
                f"config.json: rope_type={rope['rope_type']!r} is not one of {known}"
            )
        options = {} if kind is None else {"layer_type": kind}
        function = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        frequencies, scale = function(hf, torch.device("cpu"), **options)
        return cls._of(frequencies, float(scale), head_dim, is_partial)

    @classmethod
    def _of(
        cls, frequencies: Tensor, scale: float, head_dim: int, is_partial: bool
    ) -> "RopeConfig":
        still = head_dim // 2 - len(frequencies) if is_partial else 0
        return cls((*frequencies.tolist(), *[0.0] * still), scale)

    @property
    def rotary_dim(self) -> int:
        return 2 * sum(frequency != 0 for frequency in self.frequencies)


def rotary_table(rope: RopeConfig, max_position: int) -> Tensor:
    """[max_position, head_dim] float32: cosines, then sines, of position times frequency."""
    frequencies = torch.tensor(rope.frequencies, dtype=torch.float32)
    angles = torch.outer(torch.arange(max_position, dtype=torch.float32), frequencies)
    scale = torch.where(frequencies == 0, 1.0, rope.scale)
    return torch.cat((angles.cos() * scale, angles.sin() * scale), dim=-1)
