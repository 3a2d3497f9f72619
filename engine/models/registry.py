"""Who computes which checkpoint. A family of our own blocks is a file in `families` and a line."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from transformers import PreTrainedConfig

from engine.checkpoint.files import CheckpointError
from engine.models.config import ModelConfig, NotOfOurBlocksError
from engine.models.families import (
    cohere,
    ernie4_5,
    exaone,
    gemma,
    glm,
    granite,
    helium,
    llama,
    mistral,
    olmo,
    phi3,
    qwen2,
    qwen3,
    smollm3,
)
from engine.models.hf_config import is_classifier, read_hf_config
from engine.models.shape import ModelShape
from engine.models.weights import weight_format

# By model_type, which decides in transformers too, whatever `architectures` says.
FAMILIES: dict[str, Callable[[PreTrainedConfig], ModelConfig]] = {
    "cohere": cohere.config,
    "cohere2": cohere.config_cohere2,
    "cwm": llama.config_cwm,
    "ernie4_5": ernie4_5.config,
    "exaone": exaone.config,
    "exaone4": exaone.config_exaone4,
    "gemma": gemma.config,
    "gemma2": gemma.config_gemma2,
    "gemma3_text": gemma.config_gemma3,
    "glm": glm.config,
    "glm4": glm.config_glm4,
    "granite": granite.config,
    "helium": helium.config,
    "llama": llama.config,
    "mistral": mistral.config,
    "olmo2": olmo.config_olmo2,
    "olmo3": olmo.config_olmo3,
    "phi3": phi3.config,
    "qwen2": qwen2.config,
    "qwen3": qwen3.config,
    "seed_oss": llama.config_seed_oss,
    "smollm3": smollm3.config,
}


def read_config(
    directory: Path,
    max_model_len: int | None = None,
    model_impl: Literal["auto", "transformers"] = "auto",
) -> ModelShape:
    """The shape of a checkpoint's model. Raises CheckpointError naming what is not supported.

    Args:
        max_model_len: see `read_hf_config`.
        model_impl: see `EngineConfig`.
    """
    hf = read_hf_config(directory, max_model_len)
    weight_format(directory, quantization=None)  # refused before anything is built
    if hf.model_type in FAMILIES and model_impl == "auto":
        try:
            return FAMILIES[hf.model_type](hf)
        except NotOfOurBlocksError:
            pass
    if is_classifier(hf):
        raise CheckpointError(
            f"config.json: architectures={hf.architectures}: classifiers are served where our own "
            f"blocks compute them ({', '.join(FAMILIES)}), and this is no such model"
        )
    from engine.models.transformers.config import TransformersShape  # its modules take long

    return TransformersShape.of(hf)
