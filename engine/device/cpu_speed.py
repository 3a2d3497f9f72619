"""What bounds a CPU's steps, reading weights or multiplying by them, measured in about a second."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch

from kernels import Ops

Weights = Literal["float32", "bfloat16", "w8a8", "int4"]
_BYTES: dict[Weights, float] = {"float32": 4, "bfloat16": 2, "w8a8": 1, "int4": 4.75 / 8}


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
    data, weight = torch.ones(2**26), torch.randn(1024, 1024)
    products: dict[Weights, Callable[[], object]] = {}
    for kind in get_args(Weights):
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        quantization = kind if kind in ("w8a8", "int4") else None
        linear = ops.pack_linear(weight.to(dtype), None, quantization)
        products[kind] = partial(linear, torch.randn(192, 1024).to(dtype))
    seconds = _least_seconds([data.sum, *products.values()])
    flops = 2 * 192 * weight.numel()
    rates = {kind: flops / least for kind, least in zip(products, seconds[1:], strict=True)}
    return CpuSpeed(data.nbytes / seconds[0], rates)


def _least_seconds(runs: list[Callable[[], object]]) -> list[float]:
    """Of each, in turns: what else the machine does meets them alike."""
    least = [float("inf")] * len(runs)
    end = time.perf_counter() + 1
    while time.perf_counter() < end:
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            least[i] = min(least[i], time.perf_counter() - start)
    return least
