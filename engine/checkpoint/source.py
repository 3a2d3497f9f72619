"""Where a checkpoint is: a directory, a GGUF file, a repository on the hub, or a URI."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from engine.checkpoint.derived import derived, made_once
from engine.checkpoint.files import CheckpointError
from engine.checkpoint.remote import RemoteFiles
from engine.demo import DEMO_MODEL
from engine.progress import Progress

_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt"]


@contextmanager
def told_of(field: str) -> Iterator[None]:
    """What is wrong with a checkpoint is said of the field that names it, if not `model`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {str(error).removeprefix('model: ')}") from error


def resolve(model: str, revision: str | None = None, wanted: list[str] = _FILES) -> Path:
    """The local directory of a checkpoint, of which these files are downloaded if it is not here.

    "manta-demo" is the model that comes with the package. A GGUF file, or REPOSITORY:QUANTIZATION
    for one on the hub, gets a directory with what its metadata say. What is a URI is copied.
    """
    if model == "manta-demo":
        return DEMO_MODEL
    path = Path(model).expanduser()
    if path.suffix == ".gguf" and path.is_file():
        return _directory_of_gguf(path)
    if path.is_dir():
        return path
    if "://" in model:
        return _copy_of(model, wanted)
    if path.is_absolute() or model.startswith((".", "~")):
        raise CheckpointError(f"model: there is no directory or GGUF file {model!r}")
    repository, _, quantization = model.partition(":")
    patterns = [f"*{quantization}*.gguf"] if quantization else wanted
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


def _copy_of(uri: str, wanted: list[str]) -> Path:
    """Made once and kept, as long as the files there do not change."""
    try:
        remote = RemoteFiles(uri, [*wanted, "*.gguf"] if uri.endswith(".gguf") else wanted)
        directory = made_once(remote.identity, remote.copy_to)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"model: {uri!r} cannot be copied ({error})") from error
    files = sorted(directory.glob("*.gguf"))
    return _directory_of_gguf(files[0]) if files else directory


def _directory_of_gguf(file: Path) -> Path:
    """A directory with a configuration and a tokenizer, made once from the file's metadata."""
    part = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", file.name)
    files = [file]
    if part:
        files = sorted(file.parent.glob(f"{part[1]}-*-of-{part[2]}.gguf"))
        if len(files) != int(part[2]):
            raise CheckpointError(f"{file}: {len(files)} of its {int(part[2])} parts are there")
    return derived(files, "engine.models.gguf.convert")
