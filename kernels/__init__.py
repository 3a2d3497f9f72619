"""Tensor operations, one interface for every device. Knows tensors; imports nothing of ours."""

from kernels.ops import AttentionNeeds, Ops, select_ops, watch_compilation

__all__ = ["AttentionNeeds", "Ops", "select_ops", "watch_compilation"]
