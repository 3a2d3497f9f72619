"""One Ray cluster and one server of the demo model for all tests of this directory."""

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")

import pytest
import ray
from ray import serve

from deployments import app
from deployments.args import AppArgs
from tests.conftest import CheckpointFactory
from tests.engine.small_tokenizer import one_character_each


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], timeout_s: float = 60, what: str = "") -> None:
    """Polls until the condition holds; fails with `what` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A local Ray cluster with Serve; yields the URL of its HTTP proxy."""
    port = free_port()
    ray.init(num_cpus=16, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_model(checkpoints: CheckpointFactory) -> Path:
    """A random checkpoint with a tokenizer: each token is one character, so any output is text."""
    directory = checkpoints("qwen3", tie_word_embeddings=True)
    one_character_each().save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(scope="session")
def server(cluster: str) -> Iterator[str]:
    """The demo model in float32 under /demo; yields its base URL."""
    args = AppArgs(
        dtype="float32", max_num_seqs=32, num_blocks=600, max_model_len=1024, num_threads=1
    )
    serve.run(app(args), name="demo", route_prefix="/demo")
    yield f"{cluster}/demo"
    serve.delete("demo")
