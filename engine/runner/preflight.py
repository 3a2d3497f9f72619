"""What an engine would refuse before it reads a weight: `python -m engine.runner.preflight`.

Settings come as JSON on the standard input; a fault goes in one line to the standard error. A
process of its own, for whoever asks need not load torch.
"""

import logging
import sys
from pathlib import Path

import torch

from engine.checkpoint.directory import directory_of
from engine.checkpoint.files import read_json
from engine.checkpoint.source import resolve
from engine.config import EngineConfig
from engine.device.kv_cache import KVCacheLayout
from engine.device.memory import available_bytes
from engine.device.select import select_device
from engine.models.config import ModelConfig
from engine.models.early import refuse_early
from engine.models.reader import open_tensors
from engine.models.registry import read_config
from engine.models.shape import ModelShape
from engine.ranks.rank_group import RankGroup
from engine.runner.new_weights import read_alike

Checkpoint = tuple[Path, ModelShape]


def read_model(config: EngineConfig) -> tuple[Path, ModelShape, Checkpoint | None]:
    """The checkpoint's directory, its model, and the draft model's if there is one.

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
    if config.weights is not None:
        try:
            read_alike(config, shape, config.weights)
        except ValueError as error:
            raise ValueError(f"weights: {str(error).removeprefix('model: ')}") from error
    if config.deterministic and not isinstance(shape, ModelConfig):
        raise ValueError(
            f"deterministic: only models of our own blocks are, not this: {shape.description}"
        )
    if shape.state_bytes:
        _check_states(config, shape)
    return directory, shape, _read_draft(config, directory, shape)


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
    try:
        own = resolve(config.draft_model)
        draft = read_config(own, config.max_model_len, config.model_impl)
        draft.check_divisible(config.num_ranks)
    except ValueError as error:
        raise ValueError(f"draft_model: {str(error).removeprefix('model: ')}") from error
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


def describe(config: EngineConfig) -> dict[str, str]:
    """What serving it would take, by topic. Raises ValueError for what would be refused."""
    directory, shape, draft = read_model(config)
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
