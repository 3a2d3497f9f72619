"""The compiled ops, for the tests that hold them against their oracles."""

import pytest
import torch

from kernels import Ops, select_ops


@pytest.fixture(scope="module")
def ops() -> Ops:
    selected = select_ops(torch.device("cpu"))
    if selected.name == "cpu-torch":
        pytest.skip("no C++ compiler here")
    return selected
