"""Which ops a device gets. The rooms are entered here only, and only when they are needed."""

from dataclasses import replace

import torch

from kernels.ops import REFERENCE, CompilationWatch, Ops
from kernels.types import AttentionNeeds


def select_ops(device: torch.device, attention: AttentionNeeds | None = None) -> Ops:
    """The fastest ops this installation has for the device.

    Raises ValueError when `attention.backend` asks for one that cannot serve here.
    """
    if device.type == "cpu":
        if attention is not None and attention.backend != "auto":
            raise ValueError(f"attention_backend: {attention.backend!r} is for GPUs; leave it out")
        from kernels.cpu.ops import cpu_ops

        ops = cpu_ops()
        if attention is not None and attention.head_dim % 16:  # torch attends
            return replace(ops, is_invariant=False)
        return ops
    if device.type == "cuda":
        from kernels.cuda.ops import cuda_ops

        return cuda_ops(device, attention)
    return REFERENCE


def watch_compilation(device: torch.device) -> CompilationWatch:
    """From now on; where nothing is compiled at run time, its list stays empty."""
    if device.type == "cuda":
        from kernels.cuda.launch import CompileWatch

        return CompileWatch()
    return _NothingCompiles()


class _NothingCompiles:
    def __init__(self) -> None:
        self.late: list[str] = []

    def start_serving(self) -> None: ...
