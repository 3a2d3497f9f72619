"""What all tests share: tiny checkpoints, made once per run, and a modest use of the machine."""

import os

# Before torch is imported, and for the processes that tests start. One thread: the models are too
# small for two, and threads that wait for each other on busy cores make a test ten times slower,
# more so if they spin while they wait. (Engines set their own number: tests give num_threads=1.)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

if TYPE_CHECKING:
    from tests.deployments.manta_serve import MantaServe

# Triton's kernels run in its interpreter where there is no GPU: to be said before it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A shell that runs the tests in the background has Ctrl-C ignored, also by the servers they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A cluster in this process, one of jobs, and one of `manta serve`. Tests that start Ray want a
# machine for themselves; those that have one of these fixtures are marked for it here, others say
# so.
_WITH_RAY = {"cluster", "jobs", "manta_serve"}


def pytest_itemcollected(item: pytest.Item) -> None:
    if _WITH_RAY.intersection(getattr(item, "fixturenames", ())):
        item.add_marker("ray")


# What takes long with few tests. It comes first, or under xdist, where a file is one worker's, the
# other would have nothing left to do beside the last of them.
_FIRST = {"playground", "test_fuzz.py"}


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # xdist's own order: most tests first


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _FIRST.isdisjoint(item.path.parts))


CheckpointFactory = Callable[..., Path]
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> CheckpointFactory:
    """checkpoints(family, **config overrides): the directory of a tiny random checkpoint.

    The same arguments give the same directory, so tests must not write into it.
    """
    made: dict[str, Path] = {}

    def make(family: str, **overrides: Any) -> Path:
        from tests.checkpoints import make_checkpoint

        key = repr((family, sorted(overrides.items())))
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(family), family, **overrides)
        return made[key]

    return make


@pytest.fixture
def edited(checkpoints: CheckpointFactory, tmp_path: Path) -> Callable[..., Path]:
    """edited(family, config=…, tensors=…): a copy of a checkpoint after functions changed it."""

    def edit(family: str, config: Edit | None = None, tensors: Edit | None = None) -> Path:
        directory = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(checkpoints(family), directory)
        if config is not None:
            content = json.loads((directory / "config.json").read_text())
            config(content)
            (directory / "config.json").write_text(json.dumps(content))
        if tensors is not None:
            from safetensors.torch import load_file, save_file

            weights = load_file(directory / "model.safetensors")
            tensors(weights)
            save_file(weights, directory / "model.safetensors", {"format": "pt"})
        return directory

    return edit


@pytest.fixture(scope="session")
def byte_model(checkpoints: CheckpointFactory) -> Path:
    """A random checkpoint with a tokenizer that can write any text; window of 2048 tokens."""
    from tests.engine.small_tokenizer import byte_level

    directory = checkpoints("qwen3", max_position_embeddings=2048)
    byte_level().save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def manta_serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator["MantaServe"]:
    """`manta serve`, as the quickstart has it; begun, not waited for. Killed at the end."""
    from tests.deployments.manta_serve import begun, family, wait_gone

    with begun(tmp_path_factory.mktemp("manta-serve")) as server:
        yield server
        started = family(server.process)
        # Two of Ray's processes look for the others for a minute before they go too.
        agents = [process for process, title in started.items() if title.endswith("Agent")]
        server.process.kill()
        server.process.wait()
        for agent in agents:
            agent.kill()
        wait_gone(started)  # kill -9 takes all that it started with it
