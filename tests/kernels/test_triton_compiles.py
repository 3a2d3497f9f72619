"""The Triton kernels compile for a GPU, without one, and once for all lengths of a step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).resolve().parent.parent.parent


def test_kernels_compile_for_hopper_and_never_again(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_gpu", "90"],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "again for other lengths: none" in done.stdout
    assert "_prompt_kernel" in done.stdout and "_sample_kernel" in done.stdout
