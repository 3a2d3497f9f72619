"""Where a checkpoint's files are: a directory, a GGUF file, a repository on the hub, or a URI.

Some may be others: its tokenizer, its chat template, its settings.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from engine.config import EngineConfig
from engine.demo import DEMO_MODEL
from engine.progress import Progress

_NAMED_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
_DERIVED = "1"  # version of what is made of files
# Of a checkpoint's files those that make up its tokenizer.
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "tekken.json", "tiktoken.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
)
# Instead of a file: where it lies, what it says, or nothing.
_Files = dict[str, Path | str | None]
_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "merges.txt"]
# Of an object store, one connection gets a part of what a network can: so many reads, of so many
# bytes.
_NUM_READS = 16
_PART = 16 << 20


class CheckpointError(ValueError):
    """The checkpoint is missing, broken or of a kind that is not supported."""


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
        remote = _RemoteFiles(uri, [*wanted, "*.gguf"] if uri.endswith(".gguf") else wanted)
        directory = _made_once(remote.identity, remote.copy_to)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"model: {uri!r} cannot be copied ({error})") from error
    files = sorted(directory.glob("*.gguf"))
    return _directory_of_gguf(files[0]) if files else directory


class _RemoteFiles:
    """Those of a checkpoint. Raises OSError, ValueError or ImportError where they cannot be had.

    Args:
        uri: a directory's or a file's, on S3, GCS, or whatever else Arrow or fsspec can open.
        wanted: patterns of a directory's files.
    """

    def __init__(self, uri: str, wanted: Collection[str]) -> None:
        from pyarrow.fs import FileSelector  # takes a while, and few need it

        self._uri = uri
        self._filesystem, path = open_uri(uri)
        info = self._filesystem.get_file_info(path)
        found = [info] if info.is_file else self._filesystem.get_file_info(FileSelector(path))
        found = [each for each in found if each.is_file]
        self._found = sorted(
            (each for each in found if any(fnmatch(each.base_name, name) for name in wanted)),
            key=lambda each: str(each.path),
        )
        if not self._found:
            raise FileNotFoundError(f"none of its {len(found)} files is one of a checkpoint")

    @property
    def identity(self) -> str:
        """What tells whether the files are still the same."""
        files = (f"{each.base_name} {each.size} {each.mtime_ns}" for each in self._found)
        return "\n".join([self._uri, *files])

    def copy_to(self, directory: Path) -> None:
        total = sum(each.size for each in self._found)
        with (
            Progress(total=total, unit="B", unit_scale=True, desc=self._uri) as progress,
            ThreadPoolExecutor(_NUM_READS) as pool,
        ):
            copies = []
            for each in self._found:
                target = directory / each.base_name
                target.touch()
                for start in range(0, each.size, _PART):
                    copies.append(pool.submit(self._copy, each.path, target, start))
            for copy in as_completed(copies):
                progress.update(copy.result())

    def _copy(self, source: str, target: Path, start: int) -> int:
        """Returns how many bytes."""
        with self._filesystem.open_input_file(source) as file:
            part = file.read_at(_PART, start)
        with target.open("r+b") as file:
            return os.pwrite(file.fileno(), part, start)


def open_uri(uri: str) -> tuple[Any, str]:
    """(Arrow's file system, the path on it)"""
    import fsspec
    import pyarrow
    from pyarrow.fs import FileSystem, FSSpecHandler, PyFileSystem

    try:
        filesystem, path = FileSystem.from_uri(uri)
    except pyarrow.ArrowInvalid:  # not one of Arrow's own
        source, path = fsspec.core.url_to_fs(uri)
        filesystem = PyFileSystem(FSSpecHandler(source))
    return filesystem, path.rstrip("/")


def _directory_of_gguf(file: Path) -> Path:
    """A directory with a configuration and a tokenizer, made once from the file's metadata."""
    part = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", file.name)
    files = [file]
    if part:
        files = sorted(file.parent.glob(f"{part[1]}-*-of-{part[2]}.gguf"))
        if len(files) != int(part[2]):
            raise CheckpointError(f"{file}: {len(files)} of its {int(part[2])} parts are there")
    return derived(files, "engine.models.gguf.convert")


def cache() -> Path:
    """Where what is made of checkpoints' files is kept."""
    return Path(os.environ.get("MANTA_CACHE_DIR") or Path.home() / ".cache" / "manta") / "models"


def derived(files: list[Path], module: str) -> Path:
    """What `python -m MODULE FILE… DIRECTORY` makes of files: a directory, made once and kept.

    Raises CheckpointError with the last line that it says.
    """
    identity = [module, _DERIVED, *states(files)]

    def make(made: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", module, *map(str, files), str(made)],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise CheckpointError(f"{files[0]} cannot be read: {reason}")

    return _made_once("\n".join(identity), make)


def states(files: list[Path]) -> list[str]:
    """What tells whether files are still the same."""
    found = ((file.resolve(), file.stat()) for file in files)
    return [f"{path} {state.st_size} {state.st_mtime_ns}" for path, state in found]


def _made_once(identity: str, make: Callable[[Path], None]) -> Path:
    """The directory that `make` has filled, kept for whoever has the same identity."""
    kept = cache()
    directory = kept / hashlib.sha256(identity.encode()).hexdigest()[:24]
    if directory.exists():
        return directory
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept) as temporary:
        made = Path(temporary) / "made"
        made.mkdir()
        make(made)
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


def directory_of(config: EngineConfig) -> Path:
    """The directory of the checkpoint that is configured, downloaded if need be.

    Where files of it are to be others, one of links, made once and kept. Raises CheckpointError.
    """
    directory = resolve(config.model, config.revision).resolve()
    others: _Files = {}
    if config.tokenizer is not None:
        theirs = resolve(config.tokenizer, wanted=list(_TOKENIZER)).resolve()
        others |= {name: _existing(theirs / name) for name in _TOKENIZER}
        if not any(others.values()):
            raise CheckpointError(f"tokenizer: {theirs} has none")
    if config.chat_template is not None:
        template = _template(config.chat_template)
        others |= {"chat_template.jinja": template, "additional_chat_templates": None}
    if config.generation_config != "auto":
        others["generation_config.json"] = _generation_config(config.generation_config)
    if config.hf_overrides:
        content = read_json(directory, "config.json")
        others["config.json"] = json.dumps(_merged(content, config.hf_overrides), indent=2)
    return _with(directory, others) if others else directory


def _existing(path: Path) -> Path | None:
    return path if path.exists() else None


def _template(given: str) -> str:
    """Of a file, or the template itself."""
    if "{{" in given or "{%" in given or "\n" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise CheckpointError(
            f"chat_template: {given!r} is neither a template nor a file with one ({error})"
        ) from error


def _generation_config(given: str) -> Path | None:
    if given == "none":
        return None
    path = Path(given).expanduser().resolve() / "generation_config.json"
    if not path.exists():
        raise CheckpointError(
            f"generation_config: {given!r} should be auto, none or a directory with a "
            "generation_config.json"
        )
    return path


def _merged(content: dict[str, object], overrides: dict[str, object]) -> dict[str, object]:
    """Objects within are merged too, as the text_config of a model that has one."""
    merged = dict(content)
    for name, value in overrides.items():
        inner = content.get(name)
        both = isinstance(inner, dict) and isinstance(value, dict)
        merged[name] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return merged


def _with(directory: Path, others: _Files) -> Path:
    """Links to the directory's files, but for these."""
    files: _Files = {path.name: path for path in sorted(directory.iterdir())}
    files |= others
    contents = [states([path]) if isinstance(path, Path) else path for path in files.values()]

    def make(made: Path) -> None:
        for name, content in files.items():
            if isinstance(content, Path):
                (made / name).symlink_to(content.resolve())
            elif content is not None:
                (made / name).write_text(content, encoding="utf-8")

    return _made_once(repr([*zip(files, contents, strict=True)]), make)
