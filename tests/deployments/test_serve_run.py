"""`serve run` and `manta serve` as a user starts and stops them, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from tests.deployments.conftest import free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
SERVE_RUN = [str(Path(sys.executable).parent / "serve"), "run"]
MANTA_SERVE = [sys.executable, "-c", "from deployments.cli import main; main()", "serve"]
SMALL = ["manta-demo", "max_model_len=1024", "num_blocks=64", "num_threads=1"]


@contextmanager
def running(
    command: list[str], log: Path, in_background: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """The command in its own process group; whatever it started is killed at the end.

    `in_background` is a script's: SIGINT is ignored from the start.
    """
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_ignore_sigint if in_background else None,
        )
        started: set[psutil.Process] = set()
        try:
            yield process
        finally:
            if process.poll() is None:
                started = set(family(process))
                process.kill()
            for child in started:
                if child.is_running():
                    child.kill()
            process.wait()


def _ignore_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_gone(processes: list[psutil.Process], timeout_s: float = 30) -> None:
    wait_until(lambda: not any(map(is_alive, processes)), timeout_s, f"none is left of {processes}")


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def open_to_others(processes: list[psutil.Process]) -> set[str]:
    """Who of them listens elsewhere than on the loopback."""
    return {
        " ".join(process.cmdline()).strip()
        for process in processes
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and not connection.laddr.ip.removeprefix("::ffff:").startswith("127.")
    }


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
    with running([*SERVE_RUN, "--address", "local", str(path)], log) as process:
        wait_until(lambda: is_up(url), 120, "the server answers")
        model = httpx.get(f"{url}/v1/models").json()["data"][0]
        assert (model["id"], model["max_model_len"]) == ("tiny", 512)
        body = {
            "messages": [{"role": "user", "content": "Repeat these words: apple river"}],
            "temperature": 0,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == "apple river"

        children = family(process)
        assert any("EngineShard" in " ".join(child.cmdline()) for child in children)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)
        wait_gone(children)


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
    with running([*SERVE_RUN, "deployments:app", argument], log) as process:
        assert process.wait(timeout=60) != 0
    output = log.read_text()
    assert says in output
    assert "Traceback" not in output


def test_in_the_background_of_a_script_it_finishes_its_answers_on_sigterm(tmp_path: Path) -> None:
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", tmp_path / "log"
    command = [*MANTA_SERVE, *SMALL, "--port", str(port)]
    body: dict[str, Any] = {
        "prompt": "a",
        "max_tokens": 900,
        "n": 4,
        "ignore_eos": True,
        "stream": True,
    }
    body["stream_options"] = {"include_usage": True}
    with running(command, log, in_background=True) as server:
        wait_until(lambda: is_up(url), 120, "the server answers")
        second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert second.returncode == 1 and "choose another by --port" in second.stderr
        # Serve's port between replicas, which asks for Ray's token.
        assert open_to_others(family(server)) == {"ray::ServeReplica:manta:Replica"}
        children = family(server)
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(signal.SIGINT)  # is for whatever runs in the foreground
            server.send_signal(signal.SIGTERM)
            wait_until(lambda: _status(url) == 503, 30, "nobody is let in any more")
            events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["usage"]["completion_tokens"] == 4 * 900
        assert server.wait(60) == 0, log.read_text()
        wait_gone(children)


def _status(url: str) -> int:
    try:
        return httpx.post(f"{url}/v1/completions", json={"prompt": "b"}).status_code
    except httpx.TransportError:
        return 0


def test_two_with_haproxy_fit_a_machine_and_each_takes_all_that_it_started_with_it(
    tmp_path: Path,
) -> None:
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    commands = [[*MANTA_SERVE, *SMALL, "--haproxy", "--port", str(port)] for port in ports]
    with (
        running(commands[0], tmp_path / "0") as stopped,
        running(commands[1], tmp_path / "1") as killed,
    ):
        wait_until(lambda: all(map(is_up, urls)), 240, "both answer")
        given = _environment_of_ray(stopped)
        directory = Path(given["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
        assert directory.stat().st_mode & 0o077 == 0  # Ray opens the socket itself to everybody
        for name in ("STATS", "METRICS"):
            port = int(given[f"RAY_SERVE_HAPROXY_{name}_PORT"])
            assert _addresses(port) == {"127.0.0.1"}, name
        replicas = {f"ray::ServeReplica:manta:{name}" for name in ("Replica", "IngressRouter")}
        assert open_to_others(family(stopped)) == replicas

        assert given["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] == "1"
        for process in family(stopped):
            if process.name() == "haproxy":
                process.kill()
        wait_until(lambda: is_up(urls[0]), 60, "a killed proxy is replaced")

        # Two of Ray's that look after the others look for a minute before they go.
        left = [p for p in family(killed) if not p.cmdline()[0].endswith("Agent")]
        agents = set(family(killed)) - set(left)
        killed.kill()
        wait_gone(left)
        for agent in agents:
            agent.kill()
        assert is_up(urls[0])

        left = family(stopped)
        stopped.send_signal(signal.SIGINT)
        assert stopped.wait(25) == 0, (tmp_path / "0").read_text()
        wait_gone(left)
        assert not directory.exists()


def _environment_of_ray(server: subprocess.Popen[bytes]) -> dict[str, str]:
    (raylet,) = [process for process in family(server) if process.name() == "raylet"]
    return raylet.environ()


def _addresses(port: int) -> set[str]:
    """Where the port is listened on."""
    return {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
    }
