"""The compiled ops, for the tests that hold them against their oracles."""

import os
from collections.abc import Iterator

import pytest
import torch

from kernels import Ops, select_ops
from tests.kernels.levels import ops_at


@pytest.fixture(scope="module")
def ops() -> Iterator[Ops]:
    """Of the processor at hand; or of any level that MANTA_TEST_LEVEL names."""
    if level := os.environ.get("MANTA_TEST_LEVEL"):
        with ops_at(level) as selected:
            yield selected
        return
    selected = select_ops(torch.device("cpu"))
    if selected.name == "cpu-torch":
        pytest.skip("no C++ compiler here")
    yield selected
