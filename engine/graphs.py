"""Decoding steps recorded once per batch size and replayed: a launch instead of hundreds.

When every row computes one token, steps differ in nothing but the numbers in their inputs. So they
are recorded, as CUDA graphs, for a ladder of batch sizes, over buffers that stay where they are. A
batch between two rungs is padded to the next with rows that nobody reads.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.transfer import to_device

_WARM_UP_RUNS = 2


def default_sizes(max_num_seqs: int) -> list[int]:
    """The ladder: each at most twice the one before, from 8 on at most 8 or an eighth more."""
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size += size if size < 8 else max(8, size // 64 * 8)
    return [*sizes, max_num_seqs]


class Recorder(Protocol):
    """What turns work into something to replay, on the device at hand."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Run the work, and return what runs it again: the same kernels on the same addresses."""


class CudaRecorder:
    """Records CUDA graphs, all of which share one pool of memory.

    That is safe as the graphs run one after another on one stream, and as none of their tensors is
    used outside: inputs and outputs lie in buffers that were allocated before.
    """

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        # First as usual, on the stream that records: kernels are compiled, library handles and NCCL
        # communicators made, none of which may happen while recording.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_RUNS):
                run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may do as they like meanwhile: NCCL's watchdog asks for events.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            run()
        return graph.replay


def select_recorder(device: torch.device) -> Recorder | None:
    """A new one, with memory of its own; None where launching costs nothing worth saving."""
    return CudaRecorder() if device.type == "cuda" else None


class DecodeGraphs:
    """One recorded step per batch size.

    Args:
        step: from rows and starts, both [N] int32 on the device, to hidden states [N, hidden]. It
            must do the same for every content of them, and wait for nothing.
        padding_row: a row of the tables that belongs to no request.
    """

    def __init__(
        self,
        recorder: Recorder,
        sizes: Sequence[int],
        step: Callable[[Tensor, Tensor], Tensor],
        padding_row: int,
        device: torch.device,
    ) -> None:
        self.sizes = sorted(sizes)
        self._step = step
        self._padding_row = padding_row
        self._device = device
        self._inputs = torch.zeros(2, self.sizes[-1], dtype=torch.int32, device=device)
        self._inputs[0] = padding_row
        # Whatever it does, a step of padding does it to no request.
        self._hidden = torch.empty_like(step(*self._inputs))
        # The largest first: the others then fit into the memory it has taken.
        self._replay = {size: recorder.record(self._bind(size)) for size in reversed(self.sizes)}

    def _bind(self, size: int) -> Callable[[], None]:
        def run() -> None:
            rows, starts = self._inputs[:, :size]
            self._hidden[:size].copy_(self._step(rows, starts))

        return run

    def fits(self, num_rows: int) -> bool:
        return num_rows <= self.sizes[-1]

    def run(self, rows: list[int], starts: list[int]) -> Tensor:
        """Hidden states [N, hidden] of these rows' tokens, to be used before the next run."""
        size = self.sizes[bisect_left(self.sizes, len(rows))]
        padding = size - len(rows)
        inputs = [rows + [self._padding_row] * padding, starts + [0] * padding]
        self._inputs[:, :size].copy_(to_device(inputs, torch.int32, self._device))
        self._replay[size]()
        return self._hidden[: len(rows)]
