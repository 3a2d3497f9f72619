"""Several nodes: a simulated cluster of real raylets, in a process of its own."""

from pathlib import Path

import pytest

from tests.deployments.subprocesses import run_module

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_replicas_spread_over_nodes_and_the_loss_of_one_breaks_only_its_own(
    tiny_model: Path,
) -> None:
    result = run_module("node_failure", str(tiny_model))
    assert result["nodes_used"] == 2
    assert result["before"] == 0
    # Six clients, each with at most its own request on the dead replica, and one more sent there
    # before its death was noticed.
    assert result["failed"] <= 6 + 6
    assert result["served_while_down"] > 0
    assert result["failed_later"] == 0
    assert result["served_later"] > 0
    # Streams whose client knows how lose nothing: not those of the dead replica either.
    assert (result["errors"], result["wrong"]) == ([], 0)
    assert result["gone_on"] > 0
