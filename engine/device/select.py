"""Which device an engine computes on."""

import torch


def select_device(name: str) -> torch.device:
    """The configured device; raises ValueError when it is not there."""
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise ValueError("device: 'cuda' was asked for, but torch sees no CUDA GPU; use 'cpu'")
    return torch.device("cuda" if name != "cpu" and has_cuda else "cpu")
