"""Where a checkpoint's files are: a directory, a GGUF file, or a Hugging Face hub repository."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from engine.demo import DEMO_MODEL
from engine.progress import Progress

_NAMED_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_DERIVED = "1"  # version of what is made of files
_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model"]


class CheckpointError(ValueError):
    """The checkpoint is missing, broken or of a kind that is not supported."""


def resolve(model: str, revision: str | None = None) -> Path:
    """The local directory of a checkpoint, downloaded if `model` is not on this machine.

    "manta-demo" is the model that comes with the package. A GGUF file, or REPOSITORY:QUANTIZATION
    for one on the hub, gets a directory with what its metadata say.
    """
    if model == "manta-demo":
        return DEMO_MODEL
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _directory_of_gguf(path)
    if path.is_dir():
        return path
    if path.is_absolute() or model.startswith((".", "~")):
        raise CheckpointError(f"model: there is no directory or GGUF file {model!r}")
    repository, _, quantization = model.partition(":")
    patterns = [f"*{quantization}*.gguf"] if quantization else _FILES
    try:
        directory = Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=patterns, tqdm_class=Progress
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"model: {model!r} is neither a directory nor a repository that the Hugging Face hub "
            f"let us download ({error})"
        ) from error

    if not quantization:
        return directory
    files = sorted(directory.rglob(f"*{quantization}*.gguf"))
    if not files:
        raise CheckpointError(f"model: {repository!r} has no GGUF file of {quantization!r}")
    return _directory_of_gguf(files[0])


def _directory_of_gguf(file: Path) -> Path:
    """A directory with a configuration and a tokenizer, made once from the file's metadata."""
    part = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", file.name)
    files = [file]
    if part:
        files = sorted(file.parent.glob(f"{part[1]}-*-of-{part[2]}.gguf"))
        if len(files) != int(part[2]):
            raise CheckpointError(f"{file}: {len(files)} of its {int(part[2])} parts are there")
    return derived(files, "engine.models.gguf.convert")


def _cache() -> Path:
    return Path(os.environ.get("MANTA_CACHE_DIR") or Path.home() / ".cache" / "manta") / "models"


def derived(files: list[Path], module: str) -> Path:
    """What `python -m MODULE FILE… DIRECTORY` makes of files: a directory, made once and kept.

    Raises CheckpointError with the last line that it says.
    """
    identity = [module, _DERIVED]
    for file in files:
        state = file.stat()
        identity.append(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}")
    cache = _cache()
    directory = cache / hashlib.sha256("\n".join(identity).encode()).hexdigest()[:24]
    if directory.exists():
        return directory
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, files), str(made)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CheckpointError(f"{files[0]} cannot be read: {reason}")
        with suppress(OSError):  # another process was faster
            made.rename(directory)
    return directory


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
