"""The least time a machine needs for a workload: bytes over bandwidth plus FLOPs over rate."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.shape import DenseShape
from engine.checkpoint.source import resolve
from engine.config import EngineConfig
from engine.device.select import select_device
from engine.device.threads import num_compute_threads
from engine.models.registry import read_config
from kernels import Ops, select_ops
from kernels.quantization import Quantization

SHAPE = Path(__file__).parent / "shapes/qwen3-0.6b"  # a config.json, for dummy weights
# Bits per weight: (layers, head). Groups of int4 share a scale; the head stays at 8 bits.
_WEIGHT_BITS: dict[str | None, tuple[float, float]] = {
    "w8a8": (8, 8),
    "int4": (4.75, 8),
    "fp8": (8, 16),
}


@dataclass(frozen=True)
class Machine:
    """What the device can do, measured here and now."""

    bytes_per_s: float  # reading memory
    flops_per_s: float  # matrix product in the model's dtype


@dataclass(frozen=True)
class Floor:
    """Seconds that a workload must take, and on what."""

    prompt_flops_s: float
    kv_read_s: float
    weights_s: float

    @property
    def total_s(self) -> float:
        return self.prompt_flops_s + self.kv_read_s + self.weights_s


def best_seconds(run: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """The shortest of several timed calls, after one to warm up; a GPU's as it counts itself."""
    run()
    timed = _gpu_seconds if device.type == "cuda" else _seconds
    return min(timed(run) for _ in range(repeats))


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _gpu_seconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def machine_for(config: EngineConfig) -> Machine:
    """As an engine of this configuration finds it: to be measured before one takes the memory."""
    device = select_device(config.device)
    if device.type == "cpu":
        torch.set_num_threads(config.num_threads or num_compute_threads(config.num_ranks))
    model = read_config(resolve(config.model, config.revision))
    dtype = getattr(torch, model.dtype if config.dtype == "auto" else config.dtype)
    machine = measure_machine(device, dtype, select_ops(device), config.quantization)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return machine


def measure_machine(
    device: torch.device,
    dtype: torch.dtype,
    ops: Ops | None = None,
    quantization: Quantization | None = None,
) -> Machine:
    """Bandwidth by summing 1 GiB, compute rate by a large product.

    The product is torch's or, where that is faster, the one of `ops`, whose quantized weights
    count for as many operations.
    """
    size = 8192 if device.type == "cuda" else 2048
    outputs = max(size, 4096)
    rows = 8192 if device.type == "cuda" else 512  # torch's own may take a second for these
    data = torch.ones(2**28, dtype=torch.float32, device=device)
    read_s = best_seconds(data.sum, device)
    del data
    x = torch.randn(rows, size, device=device).to(dtype)
    weight = torch.randn(outputs, size, device=device).to(dtype)
    product_s = best_seconds(lambda: x @ weight.T, device)
    if ops is not None:
        linear = ops.pack_linear(weight, None, quantization)
        product_s = min(product_s, best_seconds(lambda: linear(x), device))
    return Machine(2**30 / read_s, 2 * rows * size * outputs / product_s)


def count_parameters(config: DenseShape) -> tuple[int, int]:
    """(parameters of all layers, parameters of the language-model head)"""
    heads = config.num_heads + 2 * config.num_kv_heads
    attention = config.hidden_size * config.head_dim * (heads + config.num_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    return config.num_layers * (attention + mlp), config.vocab_size * config.hidden_size


def weight_bytes(config: DenseShape, quantization: str | None, dtype_bytes: int = 2) -> float:
    """Bytes of weights that a decode step reads."""
    bits = (8 * dtype_bytes, 8 * dtype_bytes)
    layer_bits, head_bits = _WEIGHT_BITS.get(quantization, bits)
    layers, head = count_parameters(config)
    return (layers * layer_bits + head * head_bits) / 8


def _token_bytes(config: DenseShape, bytes_per_value: int) -> int:
    """Keys and values of one token in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * bytes_per_value


def decode_step_s(
    config: DenseShape,
    batch: int,
    context: float,
    machine: Machine,
    quantization: str | None = None,
    cache_bytes_per_value: int = 2,
) -> float:
    """Least seconds of a step in which `batch` requests of `context` tokens get one more."""
    layers, head = count_parameters(config)
    kv_bytes = _token_bytes(config, cache_bytes_per_value) * context * batch
    read_s = (weight_bytes(config, quantization) + kv_bytes) / machine.bytes_per_s
    return max(read_s, 2 * (layers + head) * batch / machine.flops_per_s)


def workload_floor(
    config: DenseShape,
    lengths: list[tuple[int, int]],
    max_num_seqs: int,
    bytes_per_value: int,
    machine: Machine,
    quantization: str | None = None,
    cache_bytes_per_value: int = 2,
) -> Floor:
    """The floor of requests with these (prompt, output) lengths, run as many at once as allowed.

    Prompts are bound by compute. Each output token reads the keys and values of all tokens before
    it, and each of the fewest possible steps reads all weights once, or takes the time of its
    products if that is longer.
    """
    layers, head = count_parameters(config)
    prompt_flops = decode_flops = kv_bytes = 0.0
    attention_flops = 4 * config.num_layers * config.num_heads * config.head_dim
    token_bytes = _token_bytes(config, cache_bytes_per_value)
    for prompt, output in lengths:
        prompt_flops += 2 * layers * prompt + attention_flops * prompt * (prompt + 1) / 2
        decode_flops += 2 * (layers * (output - 1) + head * output)
        contexts = (output - 1) * prompt + output * (output - 1) / 2
        kv_bytes += contexts * token_bytes
    outputs = [output for _, output in lengths]
    num_steps = max(max(outputs), sum(outputs) / max_num_seqs)
    step_bytes = weight_bytes(config, quantization, bytes_per_value)
    weights_s = num_steps * step_bytes / machine.bytes_per_s
    return Floor(
        prompt_flops_s=prompt_flops / machine.flops_per_s,
        kv_read_s=kv_bytes / machine.bytes_per_s,
        weights_s=max(weights_s, decode_flops / machine.flops_per_s),
    )
