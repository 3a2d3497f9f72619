"""Who computes which checkpoint. A family of our own blocks is a file in `families` and a line."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedConfig

from engine.checkpoint import CheckpointError
from engine.models.config import ModelConfig, NotOfOurBlocksError
from engine.models.families import llama, mistral, qwen2, qwen3
from engine.models.hf_config import is_classifier, read_hf_config
from engine.models.shape import ModelShape
from engine.models.weights import weight_format

# By model_type, which decides in transformers too, whatever `architectures` says.
FAMILIES: dict[str, Callable[[PreTrainedConfig], ModelConfig]] = {
    "qwen3": qwen3.config,
    "qwen2": qwen2.config,
    "llama": llama.config,
    "mistral": mistral.config,
}


def read_config(directory: Path, max_model_len: int | None = None) -> ModelShape:
    """The shape of a checkpoint's model. Raises CheckpointError naming what is not supported.

    Args:
        max_model_len: see `read_hf_config`.
    """
    hf = read_hf_config(directory, max_model_len)
    weight_format(directory, quantization=None)  # refused before anything is built
    if hf.model_type in FAMILIES:
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
