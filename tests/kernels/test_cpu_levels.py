"""The kernels at every level of instructions, also of processors that are not at hand.

Here each level runs a few cases of each kernel, compiled without optimization. All of the
tests, as they are compiled for users:

    pytest -m slow tests/kernels/test_cpu_levels.py
    MANTA_TEST_LEVEL=aarch64-neon_bf16 pytest tests/kernels/test_cpu_ops.py   # one level
"""

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels import Ops
from kernels.cpu.build import choose_level
from kernels.quantization import Quantization
from tests.kernels import grouped, levels, test_cpu_bits, test_cpu_ops, test_cpu_sampling

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", params=levels.ALL)
def ops(request: pytest.FixtureRequest) -> Iterator[Ops]:
    if request.param == f"{platform.machine()}-{choose_level().name}":
        pytest.skip("the level at hand, of which the other tests are")
    with levels.ops_at(request.param, optimized=False) as ops:
        yield ops


@pytest.mark.parametrize("dtype", DTYPES)
def test_products(ops: Ops, dtype: torch.dtype) -> None:
    kinds: tuple[Quantization | None, ...] = (None, "w8a8", "int4")
    for quantization in kinds:
        test_cpu_ops.check_linear(ops, dtype, quantization, rows=8, inputs=576, outputs=70)
        test_cpu_bits.check_rows_in_any_batch(ops, dtype, quantization, rows=8, inputs=576)


def test_weights_as_they_are_stored(ops: Ops) -> None:
    for kind in grouped.KINDS:
        test_cpu_ops.check_grouped(ops, torch.bfloat16, kind, rows=7, inputs=256, outputs=40)
        test_cpu_bits.check_grouped_rows_in_any_batch(ops, kind, rows=8, inputs=256)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(ops: Ops, dtype: torch.dtype) -> None:
    for seed in (0, 3):
        test_cpu_ops.test_attention_random(ops, dtype, seed)
    test_cpu_ops.test_attention_over_an_fp8_cache(ops, dtype, 1)
    test_cpu_bits.test_attention_of_a_sequence_in_any_pieces(ops, dtype, 1, fp8=False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rest(ops: Ops, dtype: torch.dtype) -> None:
    test_cpu_ops.test_norms_and_activation(ops, dtype, 33)
    test_cpu_ops.test_norm_rotary_store(ops, dtype, 80, normed=True, fused=True)
    test_cpu_sampling.test_same_tokens_as_the_reference(ops, dtype, 257)
    if dtype != torch.float32:
        test_cpu_ops.test_every_value_is_stored_in_fp8_as_torch_rounds_it(ops, dtype)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("level", levels.ALL)
def test_all_of_the_tests(level: str) -> None:
    names = ("test_cpu_ops.py", "test_cpu_bits.py", "test_cpu_sampling.py")
    files = [str(Path(__file__).with_name(name)) for name in names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        env=os.environ | {"MANTA_TEST_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )
    print(level, done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout
