"""What config.json alone refuses, before anything is imported that could look closer."""

import json
from pathlib import Path

from engine.checkpoint.files import CheckpointError, read_json
from engine.config import EngineConfig

TABLE = Path(__file__).with_name("unserved.json")
# Kinds of decoders that are not served, and why: made by `python -m tests.models.sweep --write`.
UNSERVED: dict[str, str] = json.loads(TABLE.read_text(encoding="utf-8"))


def refuse_early(config: EngineConfig, directory: Path) -> None:
    """Raises ValueError for what would be refused when seconds have been spent on its model."""
    content = read_json(directory, "config.json")
    inner = content.get("text_config")
    text = inner if isinstance(inner, dict) else content
    if (kind := text.get("model_type")) in UNSERVED:
        raise CheckpointError(UNSERVED[kind])
    heads = text.get("num_attention_heads")
    if isinstance(heads, int):
        check_split("attention heads", heads, config.num_ranks)


def check_split(name: str, number: int, num_ranks: int) -> None:
    """Raises ValueError where not every rank can have as many of them."""
    if number % num_ranks:
        raise ValueError(
            f"tensor_parallel_size: the model's {number} {name} cannot be split over {num_ranks} "
            "ranks; take a number that divides them"
        )
