"""Decoding steps recorded once per batch size and replayed: a launch instead of hundreds.

When every row computes one token, steps differ in nothing but the numbers in their inputs. So they
are recorded over buffers that stay where they are. On a GPU, where that takes time and memory, it
is done beforehand for a ladder of batch sizes, and a batch between two rungs is padded to the next
with rows that nobody reads. On a CPU, where padding costs more than recording, every batch size is
recorded when it first comes.
"""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.device.transfer import to_device
from kernels.ops import Recorder

_PADDING = -1  # no row of the tables


def default_sizes(max_num_seqs: int) -> list[int]:
    """The ladder: each at most twice the one before, from 8 on at most 8 or an eighth more."""
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size += size if size < 8 else max(8, size // 64 * 8)
    return [*sizes, max_num_seqs]


class RecordedSteps:
    """One recorded step per batch size.

    Args:
        sizes: the batch sizes to record, all at once or, by the recorder's choice, as they come.
        step: from rows and starts, both [N] int32 on the device, to hidden states [N, hidden]; a
            row of -1 is padding, of which nothing is kept.
    """

    def __init__(
        self,
        recorder: Recorder,
        sizes: Sequence[int],
        step: Callable[[Tensor, Tensor], Tensor],
        device: torch.device,
    ) -> None:
        self.sizes = sorted(sizes)
        self.num_replays = 0
        self._recorder = recorder
        self._step = step
        self._device = device
        self._inputs = torch.zeros(2, self.sizes[-1], dtype=torch.int32, device=device)
        self._inputs[0] = _PADDING
        self._recorded: dict[int, tuple[Tensor, Callable[[], None]]] = {}
        self._works = True
        if recorder.ahead:
            # The largest first: the others then fit into the memory it has taken.
            for size in reversed(self.sizes):
                self._record(size)

    def _record(self, size: int) -> Tensor:
        rows, starts = self._inputs[:, :size]
        hidden, replay = self._recorder.record(lambda: self._step(rows, starts))
        if replay is None:
            self._works = False
        else:
            self._recorded[size] = hidden, replay
        return hidden

    def fits(self, num_rows: int) -> bool:
        return self._works and num_rows <= self.sizes[-1]

    def run(self, rows: "array[int]", starts: "array[int]") -> Tensor:
        """Hidden states [N, hidden] of these rows' tokens, to be used before the next run."""
        size = self.sizes[bisect_left(self.sizes, len(rows))]
        inputs = np.zeros((2, size), np.int32)
        inputs[:, : len(rows)] = rows, starts
        inputs[0, len(rows) :] = _PADDING
        self._inputs[:, :size].copy_(to_device(inputs, torch.int32, self._device))
        if size not in self._recorded:
            return self._record(size)[: len(rows)]
        hidden, replay = self._recorded[size]
        replay()
        self.num_replays += 1
        return hidden[: len(rows)]
