"""The Triton kernels compile for a GPU, without one, and once for all lengths of a step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize(
    "arguments",
    [
        ["90"],
        ["80", "--few"],
        ["89", "--few"],
        ["120", "--few"],
        *(pytest.param([other], marks=pytest.mark.slow) for other in ("80", "86", "100", "120")),
    ],
)
def test_kernels_compile_and_never_again(arguments: list[str]) -> None:
    """All of them for Hopper, and by hand for others; a few for each kind of them."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_gpu", *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "again for other lengths: none" in done.stdout
    assert "_prompt_kernel" in done.stdout and "_sample_kernel" in done.stdout
