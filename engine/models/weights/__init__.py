"""How checkpoints store the weights of linear maps: a file per format."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.checkpoint.files import CheckpointError, read_json
from engine.models.weights.format import WeightFormat
from engine.models.weights.plain import PlainWeights
from engine.models.weights.stored import stored_format
from kernels.quantization import Quantization

# By quant_method of config.json's quantization_config, which each is given.
FORMATS: dict[str, Callable[[dict[str, Any]], WeightFormat]] = {}
# What tells of a format otherwise: a file, or a field of config.json.
_OTHER_SIGNS = {
    "hf_quant_config.json": "of NVIDIA's ModelOpt",
    "quantize_config.json": "of an old AutoGPTQ",
    "quant_config.json": "of an old AutoAWQ",
    "quantization": "of MLX",
}


def weight_format(directory: Path, quantization: Quantization | None) -> WeightFormat:
    """The format of a checkpoint. Raises CheckpointError when it is not supported.

    Args:
        quantization: what plain weights are rounded to when they are loaded.
    """
    hf = read_json(directory, "config.json")
    stored = hf.get("quantization_config")
    if stored is None:
        for sign, whose in _OTHER_SIGNS.items():
            found = read_json(directory, sign) if sign.endswith(".json") else hf.get(sign)
            if found:
                raise CheckpointError(
                    f"{directory}: the weights are in the format {whose}, as {sign} tells "
                    f"({found!r}), which is not supported"
                )
        return PlainWeights(quantization)
    method = stored.get("quant_method")
    is_dequantized = method not in FORMATS and stored_format(stored) is not None
    if method not in FORMATS and not is_dequantized:
        raise CheckpointError(
            f"config.json: quantization_config={stored!r} is not supported; supported: none, "
            "compressed-tensors, fp8, gptq, awq with 4 bits, bitsandbytes"
            + "".join(f", {other}" for other in FORMATS)
        )
    if quantization is not None:
        raise CheckpointError(
            f"quantization: {quantization!r} is for plain weights, this checkpoint is in {method}"
        )
    return PlainWeights() if is_dequantized else FORMATS[method](stored)
