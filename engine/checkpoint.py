"""Where a checkpoint's files are: a directory, or a snapshot of a Hugging Face hub repository."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from engine.demo import DEMO_MODEL
from engine.progress import Progress

_NAMED_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model"]


class CheckpointError(ValueError):
    """The checkpoint is missing, broken or of a kind that is not supported."""


def resolve(model: str, revision: str | None = None) -> Path:
    """The local directory of a checkpoint, downloaded if `model` is not a directory.

    "manta-demo" is the model that comes with the package.
    """
    if model == "manta-demo":
        return DEMO_MODEL
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")):
        raise CheckpointError(f"model: there is no directory {model!r}")
    try:
        directory = snapshot_download(
            model, revision=revision, allow_patterns=_FILES, tqdm_class=Progress
        )
        return Path(directory)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"model: {model!r} is neither a directory nor a repository that the Hugging Face hub "
            f"let us download ({error})"
        ) from error


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
