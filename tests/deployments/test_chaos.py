"""A short chaos run; the long one is `python -m benchmarks.chaos`."""

import subprocess
import sys

import pytest

from tests.deployments.conftest import free_port
from tests.deployments.subprocesses import ROOT

# The faults one by one, and in the suite, are in test_recovery.py.
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_no_stream_is_lost_or_changed_by_killed_hung_and_failing_shards() -> None:
    """The script fails unless every text is right and nothing is held or left behind."""
    arguments = "--seconds 15 --clients 8 --tokens 100 --interval 5 --heartbeat-timeout 3"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.chaos", *arguments.split(), "--port", str(free_port())],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
