"""Tensor operations, one interface for every device. Knows tensors; imports nothing of ours."""

from kernels.ops import AttentionNeeds, Ops, select_ops

__all__ = ["AttentionNeeds", "Ops", "select_ops"]
