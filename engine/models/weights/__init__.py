"""How checkpoints store the weights of linear maps: a file per format."""

from collections.abc import Callable
from typing import Any

from engine.checkpoint import CheckpointError
from engine.models.weights.format import WeightFormat
from engine.models.weights.plain import PlainWeights
from kernels.quantization import Quantization

# By quant_method of config.json's quantization_config, which each is given.
FORMATS: dict[str, Callable[[dict[str, Any]], WeightFormat]] = {}


def weight_format(hf: dict[str, Any], quantization: Quantization | None) -> WeightFormat:
    """The format that a config.json names. Raises CheckpointError when it is not supported.

    Args:
        quantization: what plain weights are rounded to when they are loaded.
    """
    stored = hf.get("quantization_config")
    if stored is None:
        return PlainWeights(quantization)
    method = stored.get("quant_method")
    if method not in FORMATS:
        raise CheckpointError(
            f"config.json: quantization_config={stored!r} is not supported; supported: "
            f"{', '.join(['none', *FORMATS])}"
        )
    if quantization is not None:
        raise CheckpointError(
            f"quantization: {quantization!r} is for plain weights, this checkpoint is in {method}"
        )
    return FORMATS[method](stored)
