"""Servers of the demo model for all tests of this directory: one under Ray, one without.

A test that is not about Ray takes `demo` or `tiny` (or `serve_locally`): those start in seconds.
"""

import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import pytest

from tests.conftest import CheckpointFactory
from tests.deployments.local_server import LocalServer, serve_locally
from tests.engine.small_tokenizer import one_character_each


def free_port() -> int:
    """Of those that no system hands out by itself: still free when a server has started."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(condition: Callable[[], bool], timeout_s: float = 60, what: str = "") -> None:
    """Polls until the condition holds; fails with `what` at the deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what or condition}"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """A local Ray cluster with Serve; yields the URL of its HTTP proxy."""
    import ray
    from ray import serve

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
    from ray import serve

    from deployments import app
    from deployments.args import AppArgs

    args = AppArgs(
        dtype="float32", max_num_seqs=32, num_blocks=600, max_model_len=1024, num_threads=1
    )
    serve.run(app(args), name="demo", route_prefix="/demo")
    yield f"{cluster}/demo"
    serve.delete("demo")


@pytest.fixture(scope="session")
def demo() -> Iterator[LocalServer]:
    """The demo model in float32, without Ray."""
    with serve_locally(
        dtype="float32", max_num_seqs=32, num_blocks=600, max_model_len=1024
    ) as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tiny_model: Path) -> Iterator[LocalServer]:
    """The tiny random model, without Ray and without a chat template."""
    with serve_locally(
        model=str(tiny_model),
        served_model_name="tiny",
        dtype="float32",
        max_num_seqs=8,
        num_blocks=64,
        block_size=8,
        max_num_batched_tokens=256,
    ) as server:
        yield server
