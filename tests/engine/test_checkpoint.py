"""A checkpoint whose tokenizer, chat template, generation config or fields are others'."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine import LLM
from engine.checkpoint.derived import cache
from engine.checkpoint.directory import directory_of
from engine.checkpoint.files import CheckpointError
from engine.config import EngineConfig
from engine.demo import DEMO_MODEL
from engine.generation_config import sampling_defaults
from engine.text.tokenizer import Tokenizer
from kernels.cache import cache_directory
from tests.conftest import CheckpointFactory


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("engine.checkpoint.derived.cache", lambda: tmp_path / "cache")


def directory(**options: Any) -> Path:
    return directory_of(EngineConfig(**{"model": str(DEMO_MODEL)} | options))


@pytest.mark.parametrize("variable", ["MANTA_CACHE_DIR", "XDG_CACHE_HOME", None])
def test_what_is_made_of_checkpoints_lies_beside_compiled_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str | None
) -> None:
    monkeypatch.delenv("MANTA_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if variable is not None:
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    assert cache() == cache_directory() / "models"


def test_without_options_it_is_the_checkpoint_itself() -> None:
    assert directory() == DEMO_MODEL


def test_a_model_may_have_another_tokenizer_and_its_template(
    checkpoints: CheckpointFactory,
) -> None:
    bare = checkpoints("qwen3")
    llm = LLM(str(bare), tokenizer="manta-demo", device="cpu", num_threads=1, num_blocks=8)
    assert llm.get_tokenizer().chat_template == Tokenizer(DEMO_MODEL).chat_template
    llm.close()
    with pytest.raises(CheckpointError, match=r"tokenizer: .* has none"):
        directory(tokenizer=str(bare))


def test_a_chat_template_is_a_file_or_written_out(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!")
    written = "{% for m in messages %}{{ m.content }}{% endfor %}"
    for given, expected in (
        (str(tmp_path / "own.jinja"), "{{ messages[0].content }}!"),
        (written, written),
    ):
        assert Tokenizer(directory(chat_template=given)).chat_template == expected
    with pytest.raises(CheckpointError, match=r"chat_template: './none.jinja' is neither"):
        directory(chat_template="./none.jinja")


def test_recommended_sampling_may_be_anothers_or_nobodys(tmp_path: Path) -> None:
    model, other = tmp_path / "model", tmp_path / "other"
    shutil.copytree(DEMO_MODEL, model)
    other.mkdir()
    for where, top_k in ((model, 5), (other, 7)):
        (where / "generation_config.json").write_text(json.dumps({"top_k": top_k}))

    def defaults(generation_config: str) -> dict[str, Any]:
        return sampling_defaults(directory(model=str(model), generation_config=generation_config))

    assert [defaults(g) for g in ("auto", str(other), "none")] == [{"top_k": 5}, {"top_k": 7}, {}]
    with pytest.raises(CheckpointError, match="generation_config: 'odd' should be auto, none or"):
        defaults("odd")


def test_fields_of_the_config_may_be_others() -> None:
    """Also those within objects; and the same ones give the same directory."""
    before = json.loads((DEMO_MODEL / "config.json").read_text())
    overrides = {"max_position_embeddings": 99, "rope_parameters": {"rope_theta": 5.0}}
    found = directory(hf_overrides=json.dumps(overrides))  # as a command line has it
    after = json.loads((found / "config.json").read_text())
    assert after["max_position_embeddings"] == 99
    assert after["rope_parameters"] == before["rope_parameters"] | {"rope_theta": 5.0}
    assert (found / "model.safetensors").resolve() == DEMO_MODEL / "model.safetensors"
    assert directory(hf_overrides=overrides) == found != directory(hf_overrides={"rope_theta": 6})
    for wrong, message in (("{", "should be a JSON object"), ("3", "valid dictionary")):
        with pytest.raises(ValueError, match=message):
            directory(hf_overrides=wrong)


def test_an_object_store_is_copied_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """file:// stands for the stores of objects: they are all opened by one library."""
    monkeypatch.setattr("engine.checkpoint.remote._PART", 100_000)  # less than a file
    store = tmp_path / "store"
    shutil.copytree(DEMO_MODEL, store)
    (store / "pytorch_model.bin").write_text("not wanted")
    found = directory(model=f"file://{store}")
    assert found.is_relative_to(tmp_path / "cache") and not (found / "pytorch_model.bin").exists()
    for path in DEMO_MODEL.iterdir():
        if path.suffix in (".json", ".safetensors", ".jinja"):
            assert (found / path.name).read_bytes() == path.read_bytes()
    assert directory(model=f"file://{store}") == found
    (store / "config.json").write_text("{}")
    assert (directory(model=f"file://{store}") / "config.json").read_text() == "{}"


def test_an_object_store_without_a_checkpoint_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    for uri, reason in (
        (f"file://{tmp_path}", "none of its 1 files is one of a checkpoint"),
        (f"file://{tmp_path}/nowhere", "nowhere"),
        ("ss3://bucket/model", "Protocol not known: ss3"),
    ):
        with pytest.raises(CheckpointError, match=f"{uri}' cannot be copied .*{reason}"):
            directory(model=uri)
