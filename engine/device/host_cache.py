"""Host memory for evicted blocks, and the copies between it and the KV cache."""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice

import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.device.kv_cache import KVCacheLayout
from engine.device.transfer import to_device
from engine.schedule.step import BlockCopy
from kernels.types import KVCache

# Blocks in flight at once, each way: so much of the device's memory goes into staging them.
_NUM_STAGED = 32


class HostCache:
    """A slot of host memory holds a block of all layers, as bytes in a row.

    On a GPU the steps' stream copies blocks to and from a staging buffer on the device, which takes
    microseconds, and a stream of its own moves that over the bus. A step waits for what it loads,
    and for what it stores only when the staging buffer is full.

    Args:
        block_bytes: of one block in all layers, keys and values.
    """

    def __init__(self, num_slots: int, block_bytes: int, device: torch.device) -> None:
        self._device = device
        self.num_slots = num_slots
        self.num_bytes = num_slots * block_bytes
        self._slots = torch.empty(num_slots, block_bytes, dtype=torch.uint8)
        shape = (_NUM_STAGED, block_bytes)
        self._outgoing = torch.empty(shape, dtype=torch.uint8, device=device)
        self._incoming = torch.empty(shape, dtype=torch.uint8, device=device)
        self._lane = _Lane(device)
        self._sent: torch.cuda.Event | None = None  # what is in outgoing has left it
        self._taken: torch.cuda.Event | None = None  # what is in incoming has been copied
        if device.type == "cuda":
            _pin(self._slots)
            weakref.finalize(self, _unpin, self._slots.data_ptr())

    def run(self, copies: Sequence[BlockCopy], kv_caches: Sequence[KVCache]) -> None:
        """Make the copies of a plan, in order, before its step."""
        tensors = [_as_bytes(tensor) for cache in kv_caches for tensor in cache.tensors]
        for to_host, group in groupby(copies, key=lambda copy: copy.to_host):
            while part := list(islice(group, _NUM_STAGED)):
                blocks = to_device([copy.block for copy in part], torch.int64, self._device)
                slots = [copy.slot for copy in part]
                (self._store if to_host else self._load)(blocks, slots, tensors)

    def _store(self, blocks: Tensor, slots: list[int], tensors: list[Tensor]) -> None:
        self._lane.steps_wait_for(self._sent)
        staged = self._outgoing[: len(slots)]
        for tensor, part in _parts(tensors, staged):
            part.copy_(tensor[blocks])
        filled = self._lane.mark_steps()
        with self._lane.after(filled):
            for slot, block in zip(slots, staged, strict=True):
                self._slots[slot].copy_(block, non_blocking=True)
            self._sent = self._lane.mark_copies()

    def _load(self, blocks: Tensor, slots: list[int], tensors: list[Tensor]) -> None:
        staged = self._incoming[: len(slots)]
        with self._lane.after(self._taken):
            for slot, block in zip(slots, staged, strict=True):
                block.copy_(self._slots[slot], non_blocking=True)
            arrived = self._lane.mark_copies()
        self._lane.steps_wait_for(arrived)
        for tensor, part in _parts(tensors, staged):
            tensor[blocks] = part
        self._taken = self._lane.mark_steps()


def new_host_cache(
    config: EngineConfig, layout: KVCacheLayout, device: torch.device
) -> HostCache | None:
    """As large as it is configured; raises ValueError where it can be of no use."""
    num_bytes, block_bytes = config.host_cache_memory_bytes, layout.groups[0].block_bytes
    if num_bytes == 0:
        return None
    if len(layout.groups) > 1:
        raise ValueError(
            f"host_cache_memory_bytes: {num_bytes} is for models whose layers all cache alike, "
            "which this one's do not; leave it out"
        )
    if num_bytes < block_bytes:
        raise ValueError(
            f"host_cache_memory_bytes: {num_bytes} is less than one block, which takes "
            f"{block_bytes}; give more, or 0"
        )
    return HostCache(num_bytes // block_bytes, block_bytes, device)


class _Lane:
    """A GPU's stream for copies, beside the current one, which runs the steps; on a CPU nothing."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def mark_steps(self) -> torch.cuda.Event | None:
        """All that has been launched on the steps' stream so far."""
        return None if self._stream is None else torch.cuda.current_stream().record_event()

    def mark_copies(self) -> torch.cuda.Event | None:
        return None if self._stream is None else self._stream.record_event()

    def steps_wait_for(self, event: torch.cuda.Event | None) -> None:
        if event is not None:
            torch.cuda.current_stream().wait_event(event)

    @contextmanager
    def after(self, event: torch.cuda.Event | None) -> Iterator[None]:
        """What is launched within is a copy, and starts after the event."""
        if self._stream is None:
            yield
            return
        if event is not None:
            self._stream.wait_event(event)
        with torch.cuda.stream(self._stream):
            yield


def _as_bytes(tensor: Tensor) -> Tensor:
    """[num_blocks, ...] of any dtype -> [num_blocks, bytes] of the same memory."""
    return tensor.view(torch.uint8).flatten(1)


def _pin(tensor: Tensor) -> None:
    """Let a GPU copy from and to it beside its work.

    By hand, for torch's allocator of pinned memory takes up to twice as much as it is asked for.
    """
    error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(error) != 0:
        raise MemoryError(
            f"host_cache_memory_bytes: {tensor.nbytes} bytes of host memory cannot be pinned "
            f"(CUDA error {int(error)}); give less"
        )


def _unpin(address: int) -> None:
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(address)


def _parts(tensors: Sequence[Tensor], staged: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Each layer's keys or values, and the columns of [N, block_bytes] where a block has them."""
    sizes = [tensor.shape[1] for tensor in tensors]
    return zip(tensors, staged.split(sizes, dim=1), strict=True)
