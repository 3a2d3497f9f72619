"""Work of a GPU recorded once and launched in one: CUDA graphs."""

from collections.abc import Callable

import torch
from torch import Tensor


class CudaRecorder:
    """Records CUDA graphs, all of which share one pool of memory.

    That is safe as the graphs run one after another on one stream. A result is kept for as long as
    its graph, so no other graph writes to it.
    """

    ahead = True
    _WARM_UP_RUNS = 2

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        """As `kernels.ops.Recorder`; everything can be recorded."""
        # First as usual, on the stream that records: kernels are compiled, library handles and NCCL
        # communicators made, none of which may happen while recording.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(self._WARM_UP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may do as they like meanwhile: NCCL's watchdog asks for events.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            result = run()
        graph.replay()
        return result, graph.replay
