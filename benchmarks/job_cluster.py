"""A Ray cluster of its own for submitted jobs, on ports of its own, as `ray start` makes it.

As clusters should be, it is closed: it takes orders only from who has its token.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.request import Request, urlopen

import psutil

ROOT = Path(__file__).resolve().parent.parent
_RAY = str(Path(sys.executable).parent / "ray")


class JobCluster:
    """One node. Use as a context manager; all its processes end with it."""

    def __init__(self, num_cpus: int = 8) -> None:
        self._num_cpus = num_cpus
        self._dashboard_port = _free_port()
        self._token = secrets.token_hex(32)
        # pytest's directories are too deep: a Unix socket's path has at most 107 characters.
        self._directory = tempfile.mkdtemp(prefix="manta-jobs-")

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._dashboard_port}"

    def __enter__(self) -> "JobCluster":
        own_ports = ("dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export")
        self._head = subprocess.Popen(
            [
                *(_RAY, "start", "--head", "--block", "--num-gpus=0"),
                *(f"--num-cpus={self._num_cpus}", f"--temp-dir={self._directory}"),
                *(f"--port={_free_port()}", f"--dashboard-port={self._dashboard_port}"),
                *(f"--{name}-port={_free_port()}" for name in own_ports),
                f"--ray-client-server-port={_free_port()}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._environment(),
        )
        try:
            _wait_until(self._is_up, 60, "the job server answers")
        except BaseException:
            self.__exit__()
            raise
        return self

    def _environment(self) -> dict[str, str]:
        """Without what would lead to another cluster; this one lives and dies with its owner."""
        own = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
        auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}
        return own | auth | {"RAY_USAGE_STATS_ENABLED": "0"}

    def _is_up(self) -> bool:
        if self._head.poll() is not None:
            raise RuntimeError("`ray start` has ended; run it by hand to see why")
        key = {"Authorization": f"Bearer {self._token}"}
        try:
            with urlopen(Request(f"{self.address}/api/jobs/", headers=key), timeout=5):
                return True
        except OSError:
            return False

    def processes(self) -> list[psutil.Process]:
        """All that the cluster has started."""
        return psutil.Process(self._head.pid).children(recursive=True)

    def __exit__(self, *_: object) -> None:
        family = self.processes()
        self._head.kill()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._head.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def submit(self, *arguments: str) -> subprocess.Popen[str]:
        """`ray job submit -- python -m deployments.batch …`; its output ends with the job."""
        environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
        return subprocess.Popen(
            [
                *(_RAY, "job", "submit", "--address", self.address),
                *("--runtime-env-json", json.dumps(environment), "--"),
                *(sys.executable, "-m", "deployments.batch", *arguments),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self._environment(),
        )

    def run(self, *arguments: str, timeout_s: float = 120) -> str:
        """Submit and wait; returns what the job printed. Raises RuntimeError if it fails."""
        job = self.submit(*arguments)
        output, _ = job.communicate(timeout=timeout_s)
        if job.returncode != 0:
            raise RuntimeError(f"the job failed:\n{output}")
        return output


def kill_driver(output: Path) -> None:
    """kill -9 to the driver of the job that writes to this directory."""
    drivers = [p for p in psutil.process_iter() if _is_driver(p, output)]
    if not drivers:
        raise RuntimeError(f"no running job writes to {output}")
    for driver in drivers:
        driver.kill()
    _wait_until(lambda: not any(d.is_running() for d in drivers), 10, "the driver is gone")


def _is_driver(process: psutil.Process, output: Path) -> bool:
    try:
        line = process.cmdline()
    except psutil.Error:
        return False
    return line[1:3] == ["-m", "deployments.batch"] and str(output) in line


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)
