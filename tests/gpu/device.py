"""Where these tests run: on the GPU, or as a rehearsal on a CPU, where Triton interprets.

The rehearsal runs the same code on smaller sizes, so that it works on the day there is a GPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.engine import Engine
from engine.runner import model_runner
from kernels.cuda.ops import triton_ops
from tests.engine.fake_recorder import FakeRecorder
from tests.engine.helpers import new_engine
from tests.triton_interpreter import DEVICE

ON_GPU = DEVICE.type == "cuda"
_PROCESSORS = torch.cuda.get_device_properties(DEVICE).multi_processor_count if ON_GPU else 2
OPS = triton_ops(_PROCESSORS)
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="there is no GPU")


def record(run: Callable[[], None]) -> Callable[[], None]:
    """Record `run` as a CUDA graph; what is returned replays it. A rehearsal runs it again."""
    run()
    if not ON_GPU:
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@contextmanager
def gpu_engine(directory: Path, **config: Any) -> Iterator[Engine]:
    """An engine on the GPU; in a rehearsal one on the CPU with a GPU's ops.

    That records, which takes its time, only if it is given sizes of graphs.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            ops = triton_ops(_PROCESSORS, config.pop("deterministic", False))
            ops = replace(ops, new_recorder=partial(FakeRecorder, strict=True))
            patch.setattr(model_runner, "select_ops", lambda *_: ops)
            config.setdefault("enforce_eager", "cuda_graph_sizes" not in config)
        with new_engine(directory, device=DEVICE.type, **config) as engine:
            yield engine
