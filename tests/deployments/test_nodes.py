"""Several nodes: a simulated cluster of real raylets, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_replicas_spread_over_nodes_and_the_loss_of_one_breaks_only_its_own(
    tiny_model: Path,
) -> None:
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.deployments.node_failure", str(tiny_model)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["nodes_used"] == 2
    assert result["before"] == 0
    # Six clients, half of them on the dead replica when it went.
    assert result["failed"] <= 6 + 6
    assert result["served_while_down"] > 0
    assert result["failed_later"] == 0
    assert result["served_later"] > 0
