"""What an engine would refuse before it reads a weight: `python -m engine.runner.preflight`.

Settings come as JSON on the standard input; a fault goes in one line to the standard error. A
process of its own, for whoever asks need not load torch.
"""

import logging
import sys
from pathlib import Path

from engine.checkpoint.directory import directory_of
from engine.checkpoint.files import read_json
from engine.checkpoint.source import resolve, told_of
from engine.config import EngineConfig
from engine.device.select import select_device
from engine.models.config import ModelConfig
from engine.models.early import refuse_early
from engine.models.registry import read_config
from engine.models.shape import ModelShape
from engine.runner.new_weights import read_alike

Checkpoint = tuple[Path, ModelShape]


def read_model(config: EngineConfig) -> tuple[Path, Checkpoint, Checkpoint | None]:
    """The model's directory, the checkpoint with its weights, and the draft model's, if any.

    Raises ValueError for what does not fit it.
    """
    directory = directory_of(config)
    refuse_early(config, directory)
    shape = read_config(directory, config.max_model_len, config.model_impl)
    if config.max_model_len and config.max_model_len > shape.max_position:
        raise ValueError(
            f"max_model_len ({config.max_model_len}) is longer than the model's window; it can "
            f"be at most {shape.max_position}"
        )
    shape.check_divisible(config.num_ranks)
    if config.deterministic and not isinstance(shape, ModelConfig):
        raise ValueError(
            f"deterministic: only models of our own blocks are, not this: {shape.description}"
        )
    if shape.state_bytes:
        _check_states(config, shape)
    weights = directory, shape
    if config.weights is not None:
        with told_of("weights"):
            weights = read_alike(config, shape, config.weights)
    return directory, weights, _read_draft(config, directory, shape)


def _check_states(config: EngineConfig, shape: ModelShape) -> None:
    """Raises ValueError for what needs a text's past anew, where only its last state is kept."""
    for name, value, can_be in (
        ("speculation", config.speculation, ("auto", "off")),
        ("host_cache_memory_bytes", config.host_cache_memory_bytes, (0,)),
    ):
        if value not in can_be:
            raise ValueError(
                f"{name}: {value!r} is not for models with states, which cannot be taken back "
                f"or shared, as this: {shape.description}"
            )


def _read_draft(config: EngineConfig, directory: Path, shape: ModelShape) -> Checkpoint | None:
    """Raises ValueError where it does not go with the model."""
    if config.draft_model is None:
        return None
    with told_of("draft_model"):
        own = resolve(config.draft_model)
        draft = read_config(own, config.max_model_len, config.model_impl)
        draft.check_divisible(config.num_ranks)
    if draft.state_bytes:
        raise ValueError(f"draft_model: its states cannot be taken back: {draft.description}")
    length = config.max_model_len or shape.max_position
    tables = [read_json(path, "tokenizer.json").get("model") for path in (directory, own)]
    vocabularies = [table["vocab"] for table in tables if table is not None]
    if draft.vocab_size != shape.vocab_size:
        reason = f"its vocabulary has {draft.vocab_size} tokens, the model's {shape.vocab_size}"
    elif len(vocabularies) == 2 and vocabularies[0] != vocabularies[1]:
        reason = "its tokenizer has other tokens than the model's"
    elif draft.max_position < length:
        reason = f"its window is {draft.max_position} tokens; lower max_model_len ({length})"
    elif not _keeps(shape, draft, config.num_ranks):
        reason = "its layers see tokens that the model's do not keep, or differ in what they keep"
    else:
        return own, draft
    raise ValueError(f"draft_model: {config.draft_model!r} does not go with the model: {reason}")


def _keeps(shape: ModelShape, draft: ModelShape, num_ranks: int) -> bool:
    """Whether the blocks of the model's first group are there as long as the draft model sees them.

    All of its layers share these.
    """
    (window, *_), (own, *others) = (
        [of.caches(num_ranks)[layers[0]].window for layers in of.cache_groups(num_ranks)]
        for of in (shape, draft)
    )
    return not others and (window is None or (own is not None and own <= window))


def main() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = EngineConfig.model_validate_json(sys.stdin.read())
    try:
        config.check_device(select_device(config.device).type)
        read_model(config)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
