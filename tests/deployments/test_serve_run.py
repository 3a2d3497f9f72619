"""`serve run` as a user starts and stops it, in processes of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from tests.deployments.conftest import free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
SERVE = str(Path(sys.executable).parent / "serve")


@contextmanager
def serve_run(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in its own process group; whatever it started is killed at the end."""
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [SERVE, "run", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started: set[psutil.Process] = set()
        try:
            yield process
        finally:
            if process.poll() is None:
                started = set(psutil.Process(process.pid).children(recursive=True))
                process.kill()
            for child in started:
                if child.is_running():
                    child.kill()
            process.wait()


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_a_serve_config_file_starts_it_and_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "llm",
                "route_prefix": "/",
                "import_path": "deployments:app",
                "args": {"served_model_name": "tiny", "max_model_len": 512, "num_blocks": 64},
            }
        ],
    }
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    log = tmp_path / "serve.log"
    url = f"http://127.0.0.1:{port}"
    # A cluster of its own: not the one that other tests have in this process.
    with serve_run(["--address", "local", str(path)], log) as process:
        wait_until(lambda: is_up(url), 120, "the server answers")
        model = httpx.get(f"{url}/v1/models").json()["data"][0]
        assert (model["id"], model["max_model_len"]) == ("tiny", 512)
        body = {
            "messages": [{"role": "user", "content": "Repeat these words: apple river"}],
            "temperature": 0,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == "apple river"

        children = psutil.Process(process.pid).children(recursive=True)
        assert any("EngineShard" in " ".join(child.cmdline()) for child in children)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)
        wait_until(
            lambda: not any(child.is_running() for child in children),
            30,
            f"no process is left of {children}",
        )


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("max_modl_len=5", "max_modl_len: unknown field, did you mean 'max_model_len'?"),
        ("block_size=zzz", "block_size: Input should be a valid integer"),
        ("max_num_seqs=4096", "must be at least max_num_seqs"),
    ],
)
def test_a_bad_argument_prints_one_readable_line(tmp_path: Path, argument: str, says: str) -> None:
    log = tmp_path / "serve.log"
    with serve_run(["deployments:app", argument], log) as process:
        assert process.wait(timeout=60) != 0
    output = log.read_text()
    assert says in output
    assert "Traceback" not in output
