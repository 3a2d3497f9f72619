"""The directory of the checkpoint that is configured, with the files that are to be others.

Those may be its tokenizer, its chat template, its settings.
"""

import json
from pathlib import Path

from engine.checkpoint.derived import made_once, states
from engine.checkpoint.files import CheckpointError, read_json
from engine.checkpoint.source import resolve
from engine.config import EngineConfig

# Of a checkpoint's files those that make up its tokenizer.
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "tekken.json", "tiktoken.model"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates"),
)
# Instead of a file: where it lies, what it says, or nothing.
_Files = dict[str, Path | str | None]


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
    """The template, which is given itself or by its file."""
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

    return made_once(repr([*zip(files, contents, strict=True)]), make)
