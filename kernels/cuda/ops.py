"""The ops for NVIDIA GPUs: Triton kernels, with flash-attn for prompts where it serves."""

import logging
import os
import shutil
import sysconfig
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kernels.cuda import flash_attention
from kernels.cuda.recorder import CudaRecorder
from kernels.ops import Ops, Rounding
from kernels.types import AttentionNeeds

_logger = logging.getLogger(__name__)


def cuda_ops(device: torch.device, needs: AttentionNeeds | None) -> Ops:
    """The ops of a GPU. See `kernels.select_ops`."""
    properties = torch.cuda.get_device_properties(device)
    if (refused := refusal(properties, needs)) is not None:
        raise ValueError(refused)
    deterministic = needs is not None and needs.deterministic
    try:
        ops = triton_ops(properties.multi_processor_count, deterministic)
    except ImportError as error:
        raise ImportError(f"a GPU needs Triton, which torch for CUDA brings: {error}") from error
    if needs is None or needs.backend == "triton" or deterministic:
        return ops
    capability = (properties.major, properties.minor)
    found = flash_attention.find(needs, capability, properties.multi_processor_count)
    if isinstance(found, str):
        if needs.backend != "auto":
            raise ValueError(f"attention_backend: {needs.backend!r} cannot serve here: {found}")
        _logger.info("prompts are attended to by Triton, not flash-attn: %s", found)
        return ops
    return replace(ops, name=f"{ops.name}+{found.name}", attention=found)


def refusal(properties: Any, needs: AttentionNeeds | None) -> str | None:
    """Why a CUDA device of these properties cannot serve these needs at all, or None."""
    capability = (properties.major, properties.minor)
    own = f"{properties.name} has {properties.major}.{properties.minor}"
    if capability < (8, 0):
        return f"device: these kernels need compute capability 8.0 (Ampere) or more; {own}"
    if needs is None or capability >= (8, 9):
        return None
    for name, is_asked in (
        ("kv_cache_dtype", needs.cache_dtype == torch.float8_e4m3fn),
        ("quantization", needs.quantization == "fp8"),
    ):
        if is_asked:
            return f"{name}: 'fp8' needs compute capability 8.9 (Ada) or more; {own}"
    return None


def lacking() -> str | None:
    """What Triton would need to build its launcher, as it does when the first kernel runs."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler"
    include = Path(sysconfig.get_paths()["include"])
    return None if (include / "Python.h").exists() else f"Python's headers ({include}/Python.h)"


def triton_ops(num_processors: int, deterministic: bool = False) -> Ops:
    """Everything by Triton but products, on a device of so many multiprocessors.

    Args:
        deterministic: compute each token by the same operations, products too.
    """
    # Products and sums are rounded once where both are there; Triton wants to be told from 3.10 on.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from kernels.cuda import elementwise, linear, rotary, sampling, step
    from kernels.cuda.attention import TritonAttention

    return Ops(
        name="cuda-triton-deterministic" if deterministic else "cuda-triton",
        attention=TritonAttention(num_processors, deterministic),
        pack_linear=partial(linear.pack_linear, deterministic=deterministic),
        pack_stored=None if deterministic else linear.pack_stored,
        sampling=sampling,
        new_recorder=CudaRecorder,
        prepare_step=step.prepare_step,
        rms_norm=elementwise.rms_norm,
        add_rms_norm=elementwise.add_rms_norm,
        silu_and_mul=elementwise.silu_and_mul,
        gelu_and_mul=elementwise.gelu_and_mul,
        rounding=Rounding(
            elementwise.add_rms_norm_rounded,
            elementwise.silu_and_mul_rounded,
            elementwise.gelu_and_mul_rounded,
        ),
        fused_norm_rotary_store=rotary.norm_rotary_store,
    )
