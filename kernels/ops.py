"""The op interface: the functions a model is made of, as one table per device."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kernels import reference


@dataclass(frozen=True)
class AttentionNeeds:
    """What a model asks of attention on a GPU."""

    backend: Literal["auto", "triton", "flash-attn-2", "flash-attn-4"]
    dtype: torch.dtype
    cache_dtype: torch.dtype
    head_dim: int
    block_size: int


class Recorder(Protocol):
    """Turns work of this device into something to run again without its many launches.

    The work must do the same for every content of the tensors it reads, and wait for nothing.
    """

    # Whether to record before there are requests, for it takes time and memory.
    ahead: bool

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None] | None]:
        """Run the work; returns its result, and what computes that anew in the same place.

        The latter is None if some of the work cannot be recorded. All recordings of one recorder
        share their memory, so a result is to be used before another is run.
        """


@dataclass(frozen=True)
class Ops:
    """The functions of `kernels.reference`, which documents them, for one device.

    A faster implementation replaces entries of the table with `dataclasses.replace`. The three
    cache functions go together: whoever allocates the cache owns its layout.
    """

    name: str
    new_kv_cache: Callable[..., reference.KVCache] = reference.new_kv_cache
    new_recorder: Callable[[], Recorder] | None = None  # where launching is worth saving
    prepare_step: Callable[..., reference.StepInputs] = reference.prepare_step
    embed: Callable[[Tensor, Tensor], Tensor] = reference.embed
    plan_attention: Callable[..., Any] = reference.plan_attention
    norm_rotary_store: Callable[..., Tensor] = reference.norm_rotary_store
    paged_attention: Callable[..., Tensor] = reference.paged_attention
    pack_linear: Callable[..., reference.Linear] = reference.pack_linear
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = reference.rms_norm
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = (
        reference.add_rms_norm
    )
    silu_and_mul: Callable[[Tensor], Tensor] = reference.silu_and_mul
    sample: Callable[..., Tensor] = reference.sample
    penalize: Callable[..., None] = reference.penalize
    apply_bitmask: Callable[[Tensor, Tensor], None] = reference.apply_bitmask
    top_logprobs: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]] = (
        reference.top_logprobs
    )


REFERENCE = Ops("reference")


def select_ops(device: torch.device, attention: AttentionNeeds | None = None) -> Ops:
    """The fastest ops this installation has for the device.

    Raises ValueError when `attention.backend` asks for one that cannot serve here.
    """
    if device.type == "cpu":
        if attention is not None and attention.backend != "auto":
            raise ValueError(f"attention_backend: {attention.backend!r} is for GPUs; leave it out")
        return _cpu_ops()
    if device.type == "cuda":
        from kernels import cuda

        return cuda.select_ops(device, attention)
    return REFERENCE


class CompilationWatch(Protocol):
    """Knows which kernels were compiled only after `start_serving`: they held up requests."""

    late: list[str]

    def start_serving(self) -> None:
        """Warm-up is over."""


def watch_compilation(device: torch.device) -> CompilationWatch:
    """From now on; where nothing is compiled at run time, its list stays empty."""
    if device.type == "cuda":
        from kernels.triton.compiles import CompileWatch

        return CompileWatch()
    return _NothingCompiles()


class _NothingCompiles:
    def __init__(self) -> None:
        self.late: list[str] = []

    def start_serving(self) -> None: ...


def _cpu_ops() -> Ops:
    from kernels.cpu import build, huge_pages
    from kernels.cpu.linear import LinearPacker, pack_linear_onednn
    from kernels.cpu.ops import CpuOps
    from kernels.cpu.recorder import CpuRecorder

    library = build.load_library()
    if library is None:
        return replace(REFERENCE, name="cpu-torch", pack_linear=pack_linear_onednn)
    fast = CpuOps(library)
    return Ops(
        name=f"cpu-{build.instruction_set()}",
        new_recorder=partial(CpuRecorder, library),
        prepare_step=fast.prepare_step,
        embed=fast.embed,
        new_kv_cache=partial(reference.new_kv_cache, allocate=huge_pages.empty),
        norm_rotary_store=fast.norm_rotary_store,
        paged_attention=fast.paged_attention,
        pack_linear=LinearPacker(library).pack_linear,
        rms_norm=fast.rms_norm,
        add_rms_norm=fast.add_rms_norm,
        silu_and_mul=fast.silu_and_mul,
        sample=fast.sample,
        apply_bitmask=fast.apply_bitmask,
        top_logprobs=fast.top_logprobs,
    )
