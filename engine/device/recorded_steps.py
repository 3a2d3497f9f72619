"""Steps recorded once per shape and replayed: a launch instead of hundreds.

Steps of as many tokens and rows differ in nothing but the numbers in their inputs. So they are
recorded over buffers that stay where they are. On a GPU, where that takes time and memory, it is
done beforehand for ladders of shapes, and a step between two is padded to the next with rows that
nobody reads, the first of which has the tokens that are too many. On a CPU, where padding costs
more than recording, every batch size is recorded when it first decodes, and small steps of rows
with drafts as they come.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.device.transfer import to_device
from kernels.ops import Recorder
from kernels.types import NO_DECODES, Decodes, StepRows

_PADDING = -1  # no row of the tables
_MOST_RECORDED = 512  # of those recorded as they come
# Of steps with prompts, in which one kernel attends to all rows. With more of them a GPU takes
# longer than launching does, and decodes faster by a kernel of its own.
_ROWS = (8, 64)
_logger = logging.getLogger(__name__)


class Shape(NamedTuple):
    """A step's size: its rows decode, with up to `longest` tokens each, or have any number."""

    tokens: int
    rows: int
    longest: int = 0  # 0: any number


def default_sizes(max_num_seqs: int) -> list[int]:
    """The ladder: each at most twice the one before, from 8 on at most 8 or an eighth more."""
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size += size if size < 8 else max(8, size // 64 * 8)
    return [*sizes, max_num_seqs]


def prompt_shapes(max_tokens: int, max_rows: int) -> list[Shape]:
    """Those to record of steps with prompts, of up to 63 rows."""
    return _shapes(16, max_tokens, max_rows)


def draft_shapes(max_tokens: int, max_rows: int, longest: int) -> list[Shape]:
    """Those to record of steps of up to 63 rows that decode, with up to `longest` tokens each."""
    return _shapes(2, max_tokens, max_rows, longest)


def _shapes(least: int, most: int, max_rows: int, longest: int = 0) -> list[Shape]:
    """Tokens in steps of a third to a half, and a row to spare for those that are too many."""
    ladder = [size for n in range(1, 32) for size in (1 << n, 3 << (n - 1))]
    tokens = [size for size in ladder if least <= size < most] + [most] * (most > 0)
    rows = [0, *sorted({min(size, max_rows + 1) for size in _ROWS})]
    return [
        Shape(size, more, longest)
        for size in tokens
        for fewer, more in pairwise(rows)
        if fewer <= size
    ]


class RecordedSteps:
    """One recorded step per shape.

    Args:
        sizes: the batch sizes that decode to record, all at once or, by the recorder's choice, as
            they come.
        others: the shapes of steps with more tokens than rows to record beforehand.
        largest: of those with more tokens than rows to record as they come.
        step: from rows to hidden states [T, hidden]; a row of -1 is padding, of which nothing is
            kept.
    """

    def __init__(
        self,
        recorder: Recorder,
        sizes: Sequence[int],
        others: Sequence[Shape],
        largest: Shape | None,
        step: Callable[[StepRows], Tensor],
        device: torch.device,
    ) -> None:
        self.sizes = sorted(sizes)
        self.num_replays = self.num_recordings = 0
        self._recorder = recorder
        self._largest = largest
        self._step = step
        self._device = device
        # Tokens and rows, by the most tokens of a row: those of rows that decode come first.
        self._ladders = {
            longest: [sorted({own[i] for own in others if own.longest == longest}) for i in (0, 1)]
            for longest in sorted({shape.longest for shape in others}, reverse=True)
        }
        most = max(self.sizes[-1], *(shape.rows for shape in others), 1)
        # Rows, starts, and where the tokens of each row begin.
        self._inputs = torch.zeros(3, most + 1, dtype=torch.int32, device=device)
        self._inputs[0] = _PADDING
        self._unit_starts = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._recorded: dict[Shape, tuple[Tensor, Callable[[], None]]] = {}
        self._works = True
        start = time.perf_counter()
        if recorder.ahead:
            shapes = [*others, *(Shape(size, size, 1) for size in self.sizes)]
            # The largest first: the others then fit into the memory it has taken.
            for shape in sorted(shapes, reverse=True):
                self._inputs[2, 1:] = shape.tokens  # all of them the first row's
                self._try_to_record(shape)
        self.seconds = time.perf_counter() - start

    def __str__(self) -> str:
        return f"{len(self._recorded)} steps recorded in {self.seconds:.1f} s"

    def _try_to_record(self, shape: Shape) -> None:
        """What attends to prompts may be another library's, and not made for it."""
        if shape.longest == 0 and 0 not in self._ladders:
            return
        try:
            self._record(shape)
        except RuntimeError as error:
            if shape.longest > 0:
                raise
            _logger.warning("steps with prompts cannot be recorded, and are launched: %s", error)
            del self._ladders[0]

    def _record(self, shape: Shape) -> Tensor:
        rows, starts = self._inputs[:2, : shape.rows]
        tokens, num_rows, longest = shape
        query_starts = self._unit_starts if longest == 1 else self._inputs[2]
        step = StepRows(
            rows,
            starts,
            query_starts[: num_rows + 1],
            num_tokens=tokens,
            decodes=Decodes(num_rows, tokens, longest) if longest else NO_DECODES,
            max_query_len=1 if longest == 1 else tokens,
        )
        hidden, replay = self._recorder.record(lambda: self._step(step))
        if replay is None:
            self._works = False
        else:
            self._recorded[shape] = hidden, replay
            self.num_recordings += 1
            if len(self._recorded) > max(_MOST_RECORDED, len(self.sizes)) and self._largest:
                del self._recorded[next(iter(self._recorded))]
        return hidden

    def _shape(self, lengths: Sequence[int]) -> Shape | None:
        """The smallest recorded one, or to be recorded, that rows of these lengths fit, if any."""
        tokens, rows = sum(lengths), len(lengths)
        if tokens == rows:
            size = _next(self.sizes, rows)
            return None if size is None else Shape(size, size, 1)
        if (most := self._largest) is not None:
            fits = tokens <= most.tokens and rows <= most.rows and max(lengths) <= most.longest
            return Shape(tokens, rows, most.longest) if fits else None
        for longest, (tokens_ladder, rows_ladder) in self._ladders.items():
            if longest == 0 or max(lengths) <= longest:
                size, more = _next(tokens_ladder, tokens), _next(rows_ladder, rows + 1)
                if size is not None and more is not None:
                    return Shape(size, more, longest)
        return None

    def run(
        self, rows: Sequence[int], starts: Sequence[int], lengths: Sequence[int]
    ) -> Tensor | None:
        """Hidden states [T, hidden] of these rows' tokens, to be used before the next run.

        None if steps of such a shape are not recorded.
        """
        shape = self._shape(lengths) if self._works else None
        if shape is None:
            return None
        num_rows, num_tokens = len(rows), sum(lengths)
        inputs = np.zeros((2 if shape.longest == 1 else 3, shape.rows + 1), np.int32)
        inputs[:2, :num_rows] = rows, starts
        inputs[0, num_rows:] = _PADDING
        if shape.longest != 1:
            inputs[2, 1 : num_rows + 1] = np.cumsum(lengths)
            inputs[2, num_rows + 1 :] = shape.tokens
        self._inputs[: len(inputs), : shape.rows + 1].copy_(
            to_device(inputs, torch.int32, self._device)
        )
        if shape not in self._recorded:
            return self._record(shape)[:num_tokens]
        hidden, replay = self._recorded[shape]
        replay()
        self.num_replays += 1
        return hidden[:num_tokens]


def _next(ladder: Sequence[int], number: int) -> int | None:
    index = bisect_left(ladder, number)
    return ladder[index] if index < len(ladder) else None
