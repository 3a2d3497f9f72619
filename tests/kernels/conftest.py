"""The compiled ops, for the tests that hold them against their oracles."""

import ctypes
import os

import pytest
import torch

from kernels import Ops, select_ops
from kernels.cpu import build

# A library to test instead: of another level, or compiled by hand.
if library := os.environ.get("MANTA_TEST_LIBRARY"):
    build.load_library = lambda: ctypes.CDLL(library)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def ops() -> Ops:
    selected = select_ops(torch.device("cpu"))
    if selected.name == "cpu-torch":
        pytest.skip("no C++ compiler here")
    return selected
