"""Where a checkpoint's files are: a directory, or a snapshot of a Hugging Face hub repository."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from engine.demo import DEMO_MODEL
from engine.progress import Progress

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


def eos_token_ids(directory: Path) -> frozenset[int]:
    """Tokens that end an output: generation_config.json's if it says, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(directory, name).get("eos_token_id")
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def sampling_defaults(directory: Path) -> dict[str, Any]:
    """The sampling parameters that the model's authors recommend, from generation_config.json."""
    recommended = read_json(directory, "generation_config.json")
    if recommended.get("do_sample") is False:  # said outright, not left out
        return {"temperature": 0.0}
    names = ("temperature", "top_k", "top_p", "min_p")
    return {name: recommended[name] for name in names if recommended.get(name) is not None}
