"""The benchmark of the ops runs through; without a GPU on tiny sizes, for nothing but that."""

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.kernels import CASES, Bench, Sizes, find_backends, measure
from benchmarks.shape import read_shape
from tests.gpu.device import DEVICE, ON_GPU, OPS

SHAPE = Path(__file__).parent.parent.parent / "benchmarks/shapes/qwen3-0.6b"


@pytest.mark.parametrize("only", CASES)
def test_benchmark_of_the_ops(only: str) -> None:
    config = read_shape(SHAPE)
    if ON_GPU:
        bench = Bench(config, Sizes(), DEVICE, find_backends(config, DEVICE))
    else:
        small = Sizes(2**16, 64, (1, 2), 20, ((17, 1),), (2,), (1,), 500)
        bench = Bench(config, small, DEVICE, {"triton": OPS})
    ceilings, results = measure(bench, only)
    assert ceilings.bytes_per_s > 0 and ceilings.flops_per_s > 0
    assert len(results) == len({result.name for result in results}) > 2
    for result in results:
        assert result.seconds > 0 and result.bytes_per_s > 0 and result.share > 0
        assert not ON_GPU or result.share < 1.25, f"{result} is faster than the GPU can be"
