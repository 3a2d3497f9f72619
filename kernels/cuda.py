"""The ops for NVIDIA GPUs: Triton kernels, with flash-attn for prompts where it serves."""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from kernels import flash_attention, reference
from kernels.ops import AttentionNeeds, Ops

_logger = logging.getLogger(__name__)


def select_ops(device: torch.device, needs: AttentionNeeds | None) -> Ops:
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
    return replace(
        ops,
        name=f"{ops.name}+{found.name}",
        plan_attention=found.plan_attention,
        paged_attention=found.paged_attention,
    )


def triton_ops(num_processors: int) -> Ops:
    """Everything by Triton, on a device of so many multiprocessors."""
    from kernels.triton import attention, elementwise, logits, rotary, sampling, step

    attend = attention.TritonAttention(num_processors)
    return Ops(
        name="cuda-triton",
        new_kv_cache=new_kv_cache,
        prepare_step=step.prepare_step,
        plan_attention=attend.plan_attention,
        norm_rotary_store=rotary.norm_rotary_store,
        paged_attention=attend.paged_attention,
        rms_norm=elementwise.rms_norm,
        add_rms_norm=elementwise.add_rms_norm,
        silu_and_mul=elementwise.silu_and_mul,
        sample=sampling.sample,
        penalize=logits.penalize,
        apply_bitmask=logits.apply_bitmask,
    )


def new_kv_cache(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> reference.KVCache:
    """As `reference.new_kv_cache`, but zeros.

    flash-attn multiplies what lies past a context in its last block by 0, so it must be finite.
    """
    shape = (num_blocks, num_kv_heads, block_size, head_dim)
    return _zeros(shape, dtype, device), _zeros(shape, dtype, device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    bits = torch.uint8 if dtype.itemsize == 1 else dtype  # not all ops are there for float8
    return torch.zeros(shape, dtype=bits, device=device).view(dtype)
