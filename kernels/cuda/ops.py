"""The ops for NVIDIA GPUs: Triton kernels, with flash-attn for prompts where it serves."""

import logging
from dataclasses import replace

import torch

from kernels.cuda import flash_attention
from kernels.cuda.recorder import CudaRecorder
from kernels.ops import Ops
from kernels.types import AttentionNeeds

_logger = logging.getLogger(__name__)


def cuda_ops(device: torch.device, needs: AttentionNeeds | None) -> Ops:
    """The ops of a GPU. See `kernels.select_ops`."""
    properties = torch.cuda.get_device_properties(device)
    try:
        ops = triton_ops(properties.multi_processor_count)
    except ImportError as error:
        raise ImportError(f"a GPU needs Triton, which torch for CUDA brings: {error}") from error
    if needs is None or needs.backend == "triton":
        return ops
    capability = (properties.major, properties.minor)
    found = flash_attention.find(needs, capability, properties.multi_processor_count)
    if isinstance(found, str):
        if needs.backend != "auto":
            raise ValueError(f"attention_backend: {needs.backend!r} cannot serve here: {found}")
        _logger.info("prompts are attended to by Triton, not flash-attn: %s", found)
        return ops
    return replace(ops, name=f"{ops.name}+{found.name}", attention=found)


def triton_ops(num_processors: int) -> Ops:
    """Everything by Triton, on a device of so many multiprocessors."""
    from kernels.cuda import elementwise, rotary, sampling, step
    from kernels.cuda.attention import TritonAttention

    return Ops(
        name="cuda-triton",
        attention=TritonAttention(num_processors),
        sampling=sampling,
        new_recorder=CudaRecorder,
        prepare_step=step.prepare_step,
        rms_norm=elementwise.rms_norm,
        add_rms_norm=elementwise.add_rms_norm,
        silu_and_mul=elementwise.silu_and_mul,
        fused_norm_rotary_store=rotary.norm_rotary_store,
    )
