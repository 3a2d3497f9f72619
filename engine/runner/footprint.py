"""What serving a model would take of a machine, before a weight is read."""

import torch

from engine.config import EngineConfig
from engine.device.kv_cache import KVCacheLayout
from engine.device.memory import available_bytes
from engine.device.select import select_device
from engine.models.reader import open_tensors
from engine.ranks.rank_group import RankGroup
from engine.runner.preflight import read_model


def describe(config: EngineConfig) -> dict[str, str]:
    """What serving it would take, by topic. Raises ValueError for what would be refused."""
    _, (directory, shape), draft = read_model(config)
    device = select_device(config.device)
    config.check_device(device.type)
    dtype = getattr(torch, shape.dtype if config.dtype == "auto" else config.dtype)
    cache_dtype = torch.float8_e4m3fn if config.kv_cache_dtype == "fp8" else dtype
    bits = {None: 8 * dtype.itemsize, "w8a8": 8, "fp8": 8, "int4": 4.75}[config.quantization]
    ranks = RankGroup(0, config.num_ranks)
    own = KVCacheLayout.of(draft[1], ranks, config.block_size, cache_dtype) if draft else None
    layout = KVCacheLayout.of(shape, ranks, config.block_size, cache_dtype, own)
    max_len = config.max_model_len or shape.max_position
    per_token = sum(
        group.block_bytes / config.block_size for group in layout.groups if group.window is None
    )
    sequence = sum(
        group.block_bytes / config.block_size * min(group.window or max_len, max_len)
        for group in layout.groups
    )
    found = {"Model": shape.description}
    left = available_bytes()
    if config.load_format != "dummy":
        with open_tensors(directory) as tensors:
            size = tensors.num_values * bits / 8
            is_narrow = bool(tensors.narrow) and dtype != torch.float32 and not config.deterministic
        name = config.quantization or str(dtype).removeprefix("torch.")
        if is_narrow and not config.quantization:
            files = [*directory.glob("*.gguf"), *directory.glob("*.safetensors")]
            size, name = float(sum(file.stat().st_size for file in files)), "the bits of the file"
        weights = size / config.num_ranks
        found["Weights"] = f"{tensors.num_values / 1e6:.0f} million in {name}: {_size(weights)}"
        left -= int(weights)
    found["KV cache"] = (
        f"{per_token / 1024:.1f} KiB per token, {_size(sequence)} for a sequence of {max_len}"
    )
    if shape.state_bytes:
        found["States"] = (
            f"{_size(shape.state_bytes)} per sequence; so no prefix is shared, and nothing drafted"
        )
    if device.type == "cpu":
        fitting = max(left, 0) // 2 / max(sequence, 1)
        found["Room"] = (
            f"for {fitting:.1f} such sequences beside the weights, of {_size(left)} free"
        )
    return found


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
