"""How much memory there is for the KV cache."""

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
# (limit, usage) files of cgroup v2 and v1.
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def available_bytes(device: torch.device) -> int:
    """Free memory of the device; of the host, within the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    for limit_name, usage_name in _CGROUP_FILES:
        try:
            limit = int((_CGROUP / limit_name).read_text())
            available = min(available, limit - int((_CGROUP / usage_name).read_text()))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return max(available, 0)
