"""Tensor operations, one interface for every device. Knows tensors; imports nothing of ours."""

from kernels.ops import Ops
from kernels.select import select_ops, watch_compilation
from kernels.types import AttentionNeeds

__all__ = ["AttentionNeeds", "Ops", "select_ops", "watch_compilation"]
