"""Which family reads which checkpoint. A family is a file in `families` and a line here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engine.checkpoint import CheckpointError, read_json
from engine.models.config import ModelConfig
from engine.models.families import llama, mistral, qwen2, qwen3
from engine.models.weights import weight_format

FAMILIES: dict[str, Callable[[dict[str, Any]], ModelConfig]] = {
    "Qwen3ForCausalLM": qwen3.config,
    "Qwen2ForCausalLM": qwen2.config,
    "LlamaForCausalLM": llama.config,
    "MistralForCausalLM": mistral.config,
}


def read_config(directory: Path) -> ModelConfig:
    """The shape of a checkpoint's model. Raises CheckpointError naming what is not supported."""
    hf = read_json(directory, "config.json")
    if not hf:
        raise CheckpointError(f"{directory} has no config.json; is it a checkpoint directory?")
    architecture = (hf.get("architectures") or ["(none)"])[0]
    if architecture not in FAMILIES:
        raise CheckpointError(
            f"architecture {architecture} is not supported; supported: {', '.join(FAMILIES)}"
        )
    weight_format(hf, quantization=None)  # refused before anything is built
    try:
        return FAMILIES[architecture](hf)
    except KeyError as error:
        raise CheckpointError(f"{directory}/config.json lacks {error}") from error
