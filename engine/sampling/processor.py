"""What requests may ask to have done to their logits before a token is drawn: one interface.

A kind of processor is a file here and an entry in `Sampler`'s list, whose order is the pipeline.
What a row wants is put on the device when it enters; what that depends on (tokens so far) lies in
tables there, so that a step that is planned ahead needs no token on the host.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from torch import Tensor

from engine.schedule.step import NewRow


def ranges(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all ranges starts[i] .. ends[i] - 1, end to end: (i of each, each)."""
    lengths = ends - starts
    index = np.repeat(np.arange(len(lengths)), lengths)
    return index, np.arange(len(index)) - (np.cumsum(lengths) - ends)[index]


R = TypeVar("R")
C = TypeVar("C")


@dataclass(frozen=True)
class LogitsRows:
    """Where tokens are to be drawn: logits row i is for position positions[i] of row rows[i].

    A row may come several times, at positions one after the other. Tokens before a position are in
    the device's table of tokens.
    """

    rows: list[int]
    positions: list[int]
    row_index: Tensor  # rows on the device, [N] int64
    position: Tensor  # positions on the device, [N] int64
    # By row: the tokens at all its positions but the last, which may turn out not to come.
    drafts: Mapping[int, Sequence[int]]


class LogitsProcessor(Protocol):
    """Knows, for each row that wants anything of its kind, what."""

    def enter(self, new: NewRow) -> None:
        """A request enters a row; what the row held before is gone."""

    def applies_to(self, rows: Sequence[int], positions: Sequence[int]) -> list[int]:
        """Which of these logits rows want anything done, by index."""

    def prepare(self, at: LogitsRows) -> None:
        """Start what can be computed on the host while the model runs."""

    def process(self, logits: Tensor, at: LogitsRows) -> None:
        """Change logits [N, V] float32 in place; of some of the rows nothing may be wanted."""


class RowRules(Generic[R, C]):
    """What the rows want that want anything.

    Args:
        combine: makes one of what the logits rows of a step want, None where that is nothing.
    """

    def __init__(self, combine: Callable[[Sequence[R | None]], C]) -> None:
        self._combine = combine
        self._rules: dict[int, R] = {}
        self._combined: tuple[list[int], C] | None = None  # of the rows of the last step

    def enter(self, row: int, rule: R | None) -> None:
        self._combined = None
        if rule is None:
            self._rules.pop(row, None)
        else:
            self._rules[row] = rule

    def __len__(self) -> int:
        return len(self._rules)

    def __getitem__(self, row: int) -> R:
        return self._rules[row]

    def applies_to(self, rows: Sequence[int]) -> list[int]:
        """Which of these rows want anything, by index."""
        rules = self._rules
        if not rules or rules.keys().isdisjoint(rows):
            return []
        return [i for i, row in enumerate(rows) if row in rules]

    def combined(self, rows: list[int]) -> C | None:
        """What these rows want; None if nothing. In the steps of decoding it stays the same."""
        if not self._rules or self._rules.keys().isdisjoint(rows):
            return None
        if self._combined is None or self._combined[0] != rows:
            self._combined = rows, self._combine([self._rules.get(row) for row in rows])
        return self._combined[1]
