"""Where a rank's memory goes, and how much of it is left for the KV cache."""

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from engine.config import EngineConfig

_CGROUP = Path("/sys/fs/cgroup")
# (limit, usage) files of cgroup v2 and v1.
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
# Of a host's memory that is free once the weights are loaded; the rest is for activations and
# whatever else runs there.
_CPU_SHARE = 0.5
# Of a GPU's whole memory: the rest is for what torch does not see (the CUDA context, NCCL).
_GPU_SHARE = 0.9


def available_bytes() -> int:
    """Free memory of the host, within the container's limit."""
    available = psutil.virtual_memory().available
    for limit_name, usage_name in _CGROUP_FILES:
        try:
            limit = int((_CGROUP / limit_name).read_text())
            available = min(available, limit - int((_CGROUP / usage_name).read_text()))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return max(available, 0)


class MemoryMeter:
    """What this process takes of a device. What other processes do does not enter."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def in_use(self) -> int:
        """Bytes; on a CPU those of the process, less files that it has mapped."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            return torch.cuda.memory_reserved(self._device)
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return int(psutil.Process().memory_info().rss)
        kinds = {line.split()[0]: line.split()[1] for line in lines if line.startswith("Rss")}
        return sum(int(kinds[kind]) * 1024 for kind in ("RssAnon:", "RssShmem:"))

    def reset_peak(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """The most since reset_peak, with what the allocator lost between blocks."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_reserved(self._device)
        return self.in_use()


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one rank, by what they are for: on its device, but for the host cache."""

    weights: int
    other: int  # tables of the running requests; on a host, this process' code and data
    activations: int | None  # at the largest step; None: not measured
    graphs: int
    kv_cache: int
    host_cache: int  # for evicted blocks
    left: int

    def __str__(self) -> str:
        parts: dict[str, int | None] = {
            "weights": self.weights,
            "activations": self.activations,
            "CUDA graphs": self.graphs or None,
            "other": self.other,
            "KV cache": self.kv_cache,
            "host cache": self.host_cache or None,
            "left for activations and others" if self.activations is None else "left": self.left,
        }
        return ", ".join(f"{name} {_readable(n)}" for name, n in parts.items() if n is not None)


@dataclass(frozen=True)
class DeviceMemory:
    """A device's memory as this process finds it, in bytes.

    A GPU's is shared out by what this process itself takes at its peak. What others hold only
    matters when they leave less than that.
    """

    total: int
    free: int  # now, including what this process' allocator holds on to
    is_host: bool

    @classmethod
    def of(cls, device: torch.device, num_ranks: int) -> "DeviceMemory":
        """Ranks on CPUs may share a host, so each counts on its part only."""
        if device.type == "cpu":
            return cls(psutil.virtual_memory().total, available_bytes() // num_ranks, True)
        free, total = torch.cuda.mem_get_info(device)
        return cls(total, free + torch.cuda.memory_reserved(device), False)

    def kv_cache_budget(self, own: int, gpu_memory_utilization: float | None) -> int:
        """Bytes for the KV cache unless the user says how many.

        Args:
            own: what this process takes of `free` besides: on a GPU weights, tables, graphs, and
                activations at their peak; on a host, where most is taken already, the host cache.
            gpu_memory_utilization: the share of a GPU's memory for all of these and the cache.
        """
        if self.is_host:
            return max(int((self.free - own) * _CPU_SHARE), 0)
        share = int(self.total * (gpu_memory_utilization or _GPU_SHARE))
        return max(min(share, self.free) - own, 0)

    def left(self, own: int, kv_cache: int) -> int:
        """Bytes for others, and on a host for activations."""
        return max(self.free - own - kv_cache, 0)


def kv_cache_bytes(
    config: EngineConfig, memory: DeviceMemory, own: int, block_bytes: int, max_len: int
) -> int:
    """What the KV cache may take, which is room for a block at least.

    Args:
        own: see `DeviceMemory.kv_cache_budget`.
        block_bytes: of a block in all layers.
        max_len: tokens that a row can have.
    Raises:
        MemoryError: there is no memory for any.
    """
    budget = config.kv_cache_memory_bytes
    if budget is None:
        budget = memory.kv_cache_budget(own, config.gpu_memory_utilization)
        if memory.is_host:  # others need it too: no more than the rows could ever fill
            blocks_per_row = -(-max_len // config.block_size)
            budget = min(budget, config.step_size.rows * blocks_per_row * block_bytes)
    if budget < block_bytes:
        raise MemoryError(
            f"no memory is left for the KV cache: it has {budget} bytes, and one block "
            f"takes {block_bytes}; free some, lower block_size or "
            "max_num_batched_tokens, or raise kv_cache_memory_bytes or, on a GPU, "
            "gpu_memory_utilization"
        )
    return budget


def _readable(size: int) -> str:
    if size >= 1 << 30:
        return f"{size / (1 << 30):.2f} GiB"
    return f"{size / (1 << 20):.1f} MiB"
