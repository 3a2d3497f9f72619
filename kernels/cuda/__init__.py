"""Triton kernels: the ops of `kernels.reference`, which documents them, for GPUs."""
