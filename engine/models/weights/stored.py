"""What a checkpoint's quantization_config says of how its linear maps are stored."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from engine.models.weights import dequantize, grouped
from engine.models.weights.dequantize import Parts
from kernels.grouped import StoredWeight


def _not_in_groups(_: Parts) -> StoredWeight | None:
    return None


@dataclass(frozen=True)
class StoredFormat:
    values: Callable[[Parts], Tensor]  # float32 [out, in]
    grouped: Callable[[Parts], StoredWeight | None] = _not_in_groups


def stored_format(stored: Mapping[str, Any]) -> StoredFormat | None:
    """None for a format that is not read."""
    method = stored.get("quant_method")
    if method == "fp8":
        return StoredFormat(partial(dequantize.scaled, block=stored.get("weight_block_size")))
    if method == "compressed-tensors":
        schemes = [group.get("weights") or {} for group in stored["config_groups"].values()]
        blocks = [scheme.get("block_structure") for scheme in schemes]
        if any(block != blocks[0] for block in blocks):
            return None
        return StoredFormat(partial(dequantize.scaled, block=blocks[0]), grouped.compressed)
    if method == "gptq":
        bits, is_v2 = int(stored.get("bits", 4)), stored.get("checkpoint_format") == "gptq_v2"
        return StoredFormat(
            partial(dequantize.gptq, bits=bits, zeros_are_less_by_one=not is_v2),
            partial(grouped.gptq, bits=bits, zeros_are_less_by_one=not is_v2),
        )
    if method == "awq" and stored.get("bits", 4) == 4 and stored.get("version", "gemm") == "gemm":
        return StoredFormat(dequantize.awq, grouped.awq)
    if method == "bitsandbytes":
        return StoredFormat(dequantize.bitsandbytes)
    return None
