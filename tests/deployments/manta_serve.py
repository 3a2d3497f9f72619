"""`serve run` and `manta serve` in processes of their own, and all that these start."""

import os
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import httpx
import psutil

from tests.deployments.conftest import free_port, wait_until

ROOT = Path(__file__).resolve().parents[2]
SERVE_RUN = [str(Path(sys.executable).parent / "serve"), "run"]
MANTA_SERVE = [sys.executable, "-c", "from deployments.cli import main; main()", "serve"]


@contextmanager
def running(
    command: list[str], log: Path, in_background: bool = False, **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """The command in its own process group; whatever it started is killed at the end.

    `in_background` is a script's: SIGINT is ignored from the start.
    """
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | environment
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


def family(process: subprocess.Popen[bytes]) -> dict[psutil.Process, str]:
    """All that it has started, and their titles."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found[child] = " ".join(child.cmdline()).strip()
    return found


def wait_gone(processes: Collection[psutil.Process]) -> None:
    wait_until(lambda: not any(map(is_alive, processes)), 30, f"none is left of {processes}")


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


@dataclass
class MantaServe:
    """One that was begun, and may not answer yet."""

    process: subprocess.Popen[bytes]
    command: list[str]
    url: str
    log: Path

    @cached_property
    def environment(self) -> dict[str, str]:
        """Of what it has started."""
        (raylet,) = [p for p, title in family(self.process).items() if "/raylet/raylet" in title]
        return raylet.environ()

    @cached_property
    def private_directory(self) -> Path:
        return Path(self.environment["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent

    def is_answering(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return is_up(self.url)


@contextmanager
def begun(
    directory: Path, *arguments: str, in_background: bool = False, **environment: str
) -> Iterator[MantaServe]:
    """`manta serve` with these arguments, on a port of its own."""
    port = free_port()
    command = [*MANTA_SERVE, *arguments, "--port", str(port)]
    log = directory / f"{port}.log"
    with running(command, log, in_background, **environment) as process:
        yield MantaServe(process, command, f"http://127.0.0.1:{port}", log)
