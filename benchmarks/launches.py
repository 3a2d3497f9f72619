"""What a launch of a Triton kernel takes of the host: with a GPU that is not there.

    python -m benchmarks.launches

Kernels are compiled for Hopper, and go all the way to where the driver would be called, which does
nothing. Prints the microseconds that an op takes of which the launch is most, by Triton's own way
and by `kernels.cuda.launch`.
"""

import time
from collections.abc import Callable
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from kernels.cuda import launch
from kernels.cuda.ops import triton_ops
from kernels.types import PagedKV


class NoLauncher:
    """Of one compiled kernel."""

    def __init__(self, *_: object) -> None: ...

    def __call__(self, *args: object) -> None:
        """Grid, stream, handle, metadata, three hooks, then the kernel's own arguments."""


class NoGpu:
    """A driver that says which GPU to compile for."""

    launcher_cls: type = NoLauncher

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}

    def load_binary(self, *_: object) -> tuple[int, ...]:
        """(module, function, registers, spilled, most threads)"""
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None: ...


def microseconds(call: Callable[[], object]) -> float:
    """The least of several rounds."""
    rounds = []
    for _ in range(10):
        begin = time.thread_time()
        for _ in range(500):
            call()
        rounds.append((time.thread_time() - begin) / 500)
    return 1e6 * min(rounds)


def calls() -> dict[str, Callable[[], object]]:
    """Of a layer of Qwen3-0.6B, a kernel each."""
    ops = triton_ops(132)
    x, weight = torch.empty(8, 1024).bfloat16(), torch.empty(1024).bfloat16()
    gates, keys = torch.empty(8, 6144).bfloat16(), torch.empty(8, 8, 128).bfloat16()
    spec = PagedKV(32, 8, 128, torch.bfloat16)
    cache = ops.attention.new_cache(4, spec, torch.device("cpu"))
    slots = torch.zeros(8, dtype=torch.int64)
    return {
        "add_rms_norm": lambda: ops.add_rms_norm(x, x, weight, 1e-6),
        "silu_and_mul": lambda: ops.silu_and_mul(gates),
        "store": lambda: ops.attention.store(keys, keys, cache, slots),
    }


def main() -> None:
    driver.set_active(NoGpu(90))
    print(f"Triton {triton.__version__}: microseconds of the host a call, by Triton and directly")
    for name, call in calls().items():
        call()
        direct = microseconds(call)
        with patch.object(launch, "_IS_KNOWN", False):
            print(f"{name:14} {microseconds(call):5.1f} {direct:5.1f}", flush=True)


if __name__ == "__main__":
    main()
