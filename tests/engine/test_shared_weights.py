"""A model that is in shared memory is mapped, not read again: the same model, to the bit."""

import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.models import loader
from engine.models.registry import read_config
from engine.models.shared import WeightFiles
from engine.runner.model_runner import ModelRunner
from tests.conftest import CheckpointFactory
from tests.engine.helpers import prompt_logits

TOKENS = list(range(3, 40))


@pytest.fixture(autouse=True)
def small_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_WORTH_SHARING_BYTES", 0)


@pytest.fixture
def files() -> Iterator[WeightFiles]:
    """As a node's keeper gives them."""
    there: dict[str, int] = {}

    def path(name: str) -> str:
        there.setdefault(name, os.memfd_create(name))
        return f"/proc/{os.getpid()}/fd/{there[name]}"

    yield path
    for file in there.values():
        os.close(file)


def runner_of(directory: Path, files: WeightFiles | None, **config: Any) -> ModelRunner:
    options = {"device": "cpu", "num_threads": 1, "max_num_seqs": 2, "num_blocks": 8} | config
    configured = EngineConfig(model=str(directory), **options)
    return ModelRunner(configured, read_config(directory), directory, files=files)


def logits(runner: ModelRunner) -> torch.Tensor:
    return prompt_logits(runner, TOKENS, [0, 1])


@pytest.mark.parametrize(
    "family, config",
    [
        ("qwen3", dict(dtype="float32")),
        ("qwen2", dict(dtype="bfloat16")),
        ("llama3", dict(quantization="w8a8")),
        ("mistral", dict(quantization="int4")),
        ("gemma", {}),
    ],
)
def test_the_model_is_the_same_and_nothing_is_read(
    checkpoints: CheckpointFactory,
    files: WeightFiles,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    config: dict[str, Any],
) -> None:
    directory = checkpoints(family)
    own = logits(runner_of(directory, None, **config))
    first = runner_of(directory, files, **config)
    assert torch.equal(logits(first), own)
    monkeypatch.setattr(loader, "load_weights", None)  # what would be called to read
    second = runner_of(directory, files, **config)
    assert torch.equal(logits(second), own)
    del first
    assert torch.equal(logits(second), own)


def test_other_weights_are_another_model(
    checkpoints: CheckpointFactory, files: WeightFiles, tmp_path: Path
) -> None:
    asked: list[str] = []

    def noted(name: str) -> str | None:
        asked.append(name)
        return files(name)

    directory = checkpoints("qwen3")
    for config in ({}, {"dtype": "bfloat16"}, {"quantization": "w8a8"}, {"max_model_len": 64}):
        runner_of(directory, noted, **config)
    os.utime(next(Path(directory).glob("*.safetensors")), ns=(1, 1))
    runner_of(directory, noted)
    assert len(set(asked)) == 5


def test_what_one_died_at_the_next_fills(
    checkpoints: CheckpointFactory, files: WeightFiles
) -> None:
    directory = checkpoints("qwen3")
    own, paths = logits(runner_of(directory, None)), []

    def half_filled(name: str) -> str | None:
        path = files(name)
        assert path is not None
        Path(path).write_bytes(b"\1" * 100_000)
        paths.append(path)
        return path

    assert torch.equal(logits(runner_of(directory, half_filled)), own)
    assert torch.equal(logits(runner_of(directory, files)), own)


def test_who_comes_meanwhile_waits_for_who_reads(
    checkpoints: CheckpointFactory, files: WeightFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, num_loads = checkpoints("qwen3"), 0
    load = loader.load_weights

    def slow(*arguments: Any, **keywords: Any) -> None:
        nonlocal num_loads
        num_loads += 1
        load(*arguments, **keywords)

    monkeypatch.setattr(loader, "load_weights", slow)
    runners: list[ModelRunner] = []
    threads = [
        threading.Thread(target=lambda: runners.append(runner_of(directory, files)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert num_loads == 1
    assert torch.equal(logits(runners[0]), logits(runners[2]))


def test_a_model_that_cannot_be_shared_is_loaded_all_the_same(
    checkpoints: CheckpointFactory, files: WeightFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoints("qwen3")
    own = logits(runner_of(directory, None))
    load = loader._load_blocks

    def with_a_lambda(*arguments: Any) -> Any:
        model = load(*arguments)
        model.extra = lambda: None
        return model

    monkeypatch.setattr(loader, "_load_blocks", with_a_lambda)
    for _ in range(2):
        assert torch.equal(logits(runner_of(directory, files)), own)


def test_the_file_is_locked_as_long_as_its_model_is_there(
    checkpoints: CheckpointFactory, files: WeightFiles
) -> None:
    paths: list[str] = []

    def noted(name: str) -> str | None:
        path = files(name)
        assert path is not None
        paths.append(path)
        return path

    runner = runner_of(checkpoints("qwen3"), noted)
    with open(paths[0], "r+b") as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        del runner
        import gc

        gc.collect()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_who_writes_to_shared_weights_dies_alone(files: WeightFiles) -> None:
    script = """
import os, torch
from kernels.cpu import huge_pages
file = os.memfd_create("weights")
os.ftruncate(file, 1 << 20)
huge_pages.shared(file, 1 << 20, writable=True).fill_(7)
read = huge_pages.shared(file, 1 << 20, writable=False)
assert read.sum() == 7 << 20
read[0] = 1
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.returncode == -11, done.stderr
