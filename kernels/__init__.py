"""Tensor operations, one interface for every device. Knows tensors; imports nothing of ours."""

from kernels.ops import Ops, select_ops

__all__ = ["Ops", "select_ops"]
