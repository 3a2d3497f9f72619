"""The ops for NVIDIA GPUs: Triton kernels, with flash-attn for prompts where it serves."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

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
        new_recorder=CudaRecorder,
        new_kv_cache=partial(reference.new_kv_cache, allocate=_zeros),
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


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As flash-attn needs it: it multiplies what lies past a context by 0, so it must be finite."""
    bits = torch.uint8 if dtype.itemsize == 1 else dtype  # not all ops are there for float8
    return torch.zeros(shape, dtype=bits).view(dtype)


class CudaRecorder:
    """Records CUDA graphs, all of which share one pool of memory.

    That is safe as the graphs run one after another on one stream. A result is kept for as long as
    its graph, so no other graph writes to it.
    """

    ahead = True
    _WARM_UP_RUNS = 2

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """As `kernels.ops.Recorder`; everything can be recorded."""
        # First as usual, on the stream that records: kernels are compiled, library handles and NCCL
        # communicators made, none of which may happen while recording.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(self._WARM_UP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may do as they like meanwhile: NCCL's watchdog asks for events.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            result = run()
        graph.replay()
        return result, graph.replay
