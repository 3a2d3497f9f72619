"""HAProxy asks a router that sees the prompt, and connects clients straight to replicas."""

from pathlib import Path

import pytest

from tests.deployments.subprocesses import run_module

pytestmark = pytest.mark.ray


def test_prompts_go_to_the_replica_that_has_their_prefix(tiny_model: Path) -> None:
    result = run_module("haproxy_routing", str(tiny_model))
    assert result["first"] == [0, 0, 0]
    # 300 shared characters are 9 blocks of 32 tokens; nobody computes them a second time.
    assert result["later"] == [288] * 12
    # Though the router sees no keys, and tells the prompts of tenants apart by nothing else.
    assert result["others"] == [0, 0, 0]
    # What the router cannot read, the replica refuses as it would have without one.
    assert result["refused"] == [400, "tempo", 400, 400]
    assert result["streamed"] > 1
    assert result["ids"] == [1, 1, 1]
