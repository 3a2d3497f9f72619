"""What bounds a CPU's steps, reading weights or multiplying by them, measured in about a second."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch

from kernels import Ops

Weights = Literal["float32", "bfloat16", "w8a8", "int4"]
_BYTES: dict[Weights, float] = {"float32": 4, "bfloat16": 2, "w8a8": 1, "int4": 4.5 / 8}


@dataclass(frozen=True)
class CpuSpeed:
    """Of all threads that an engine computes on."""

    bytes_per_s: float  # reading memory
    flops_per_s: dict[Weights, float]  # of products of many rows

    def fastest(self, kinds: tuple[Weights, ...], step_tokens: tuple[int, ...]) -> Weights:
        """What takes the least time for a step of each of these sizes."""

        def seconds(kind: Weights, tokens: int) -> float:  # for one weight
            return max(_BYTES[kind] / self.bytes_per_s, 2 * tokens / self.flops_per_s[kind])

        return min(kinds, key=lambda kind: sum(seconds(kind, tokens) for tokens in step_tokens))


@torch.inference_mode()
def measure(ops: Ops) -> CpuSpeed:
    data = torch.ones(2**26)
    bytes_per_s = data.nbytes / _best_seconds(data.sum)
    del data
    weight = torch.randn(1024, 1024)
    rates: dict[Weights, float] = {}
    for kind in get_args(Weights):
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        quantization = kind if kind in ("w8a8", "int4") else None
        linear = ops.pack_linear(weight.to(dtype), None, quantization)
        x = torch.randn(192, 1024).to(dtype)
        rates[kind] = 2 * x.numel() * len(weight) / _best_seconds(partial(linear, x))
    return CpuSpeed(bytes_per_s, rates)


def _best_seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
