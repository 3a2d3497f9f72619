"""Scores that fall with the distance of tokens (ALiBi), by attention that knows of none.

To softmax a slope times the distance is the same as the slope times the key's position, a product
of two more dimensions of query and key.
"""

import torch
from torch import Tensor

_EXACT = 256  # multiples of it, and integers below, are exact in 16 bits


def width_with_positions(head_dim: int) -> int:
    """Of heads that have them: a multiple of what kernels take at once."""
    return -(-(head_dim + 2) // 16) * 16


def with_positions(
    q: Tensor, k: Tensor, slopes: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """q [1, H, T, D] and k [1, K, T, D] with two dimensions more.

    Args:
        slopes: [H], of scores before they are scaled.
        positions: [T], of the tokens.
    """
    low = positions % _EXACT
    parts = torch.stack((positions - low, low), dim=-1).to(k.dtype)
    of_queries = slopes.to(q.dtype).view(1, -1, 1, 1).expand(*q.shape[:3], 2)
    of_keys = parts.expand(*k.shape[:3], 2)
    return torch.cat((q, of_queries), -1), torch.cat((k, of_keys), -1)
