"""Which checkpoints may take the place of the one that an engine computes with."""

from pathlib import Path

from engine.checkpoint.directory import directory_of
from engine.config import EngineConfig
from engine.models.registry import read_config
from engine.models.shape import ModelShape


def with_weights_of(config: EngineConfig, path: str) -> EngineConfig:
    """The settings by which another checkpoint's weights are loaded; its tokenizer is no matter."""
    own = dict(model=path, revision=None, load_format="safetensors")
    others = dict(tokenizer=None, chat_template=None, generation_config="auto")
    return config.model_copy(update=own | others)


def read_alike(config: EngineConfig, shape: ModelShape, path: str) -> tuple[Path, ModelShape]:
    """Directory and shape of a checkpoint that the engine's requests and blocks are good for.

    Raises ValueError for any other.

    Args:
        shape: of the model that there is.
    """
    directory = directory_of(with_weights_of(config, path))
    other = read_config(directory, config.max_model_len, config.model_impl)
    differences = [
        f"{name} is {there}, here {here}"
        for name, there, here in (
            ("kind", type(other).__name__, type(shape).__name__),
            ("vocab_size", other.vocab_size, shape.vocab_size),
            ("num_labels", other.num_labels, shape.num_labels),
            ("state_bytes", other.state_bytes, shape.state_bytes),
        )
        if there != here
    ]
    if not differences and [*other.caches(config.num_ranks)] != [*shape.caches(config.num_ranks)]:
        differences = ["its layers keep other keys and values"]
    max_len = config.max_model_len or shape.max_position
    if other.max_position < max_len:
        differences.append(f"its window is {other.max_position} tokens, here {max_len}")
    if differences:
        raise ValueError(
            f"{path!r} is another model, for an engine of its own: {'; '.join(differences)}"
        )
    return directory, other
