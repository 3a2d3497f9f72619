"""What a checkpoint's small files say."""

import json
from pathlib import Path
from typing import Any

_NAMED_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


class CheckpointError(ValueError):
    """The checkpoint is missing, broken or of a kind that is not supported."""


def read_json(directory: Path, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint, or {} when it has none of that name."""
    path = directory / name
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold a JSON object")
    return content


def tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, and the special_tokens_map.json that goes with old ones."""
    config = read_json(directory, "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    return config | read_json(directory, "special_tokens_map.json")


def special_tokens(directory: Path) -> dict[str, str]:
    """Texts of the tokenizer's special tokens that have a name; in transformers' order."""
    config = tokenizer_config(directory)
    extra = config.get("extra_special_tokens")
    named: dict[str, Any] = dict.fromkeys(_NAMED_TOKENS)
    named |= {name: token for name, token in config.items() if name.endswith("_token")}
    named |= extra if isinstance(extra, dict) else {}
    return {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in named.items()
        if isinstance(token, (str, dict))
    }
