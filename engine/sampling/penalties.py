"""Repetition, presence and frequency penalties."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from engine.device.transfer import to_device
from engine.sampling.processor import LogitsRows, ranges
from engine.schedule.step import NewRow
from kernels import Ops

_NONE = (1.0, 0.0, 0.0)  # repetition, presence, frequency


class Penalties:
    """Counts the output tokens of rows with penalties, by what the table of tokens says.

    Args:
        token_ids: [rows, max length] int64, the device's table of tokens.
    """

    def __init__(self, token_ids: Tensor, vocab_size: int, ops: Ops) -> None:
        self._token_ids = token_ids
        self._vocab_size = vocab_size
        self._ops = ops
        self._device = token_ids.device
        # By row: the position before which all of its output is counted; -1: it has no penalties.
        self._counted = np.full(len(token_ids), -1)
        # Made when the first request wants them: [rows, V] int32, how often each token is in the
        # output, and [rows, 3] float32, the repetition, presence and frequency penalties.
        self._counts: Tensor | None = None
        self._penalties: Tensor | None = None

    def enter(self, new: NewRow) -> None:
        self._counted[new.row] = -1
        params = new.params
        if params.has_penalties:
            counts, penalties = self._tables()
            output = self._tensor(new.token_ids[new.num_prompt_tokens :])
            ones = torch.ones_like(output, dtype=torch.int32)
            counts[new.row].zero_().index_add_(0, output, ones)
            values = params.repetition_penalty, params.presence_penalty, params.frequency_penalty
            penalties[new.row] = to_device(values, torch.float32, self._device)
            self._counted[new.row] = len(new.token_ids)
        elif self._penalties is not None:
            self._penalties[new.row] = to_device(_NONE, torch.float32, self._device)

    def _tables(self) -> tuple[Tensor, Tensor]:
        if self._counts is None or self._penalties is None:
            shape = len(self._token_ids), self._vocab_size
            self._counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
            none = to_device(_NONE, torch.float32, self._device)
            self._penalties = none.repeat(len(self._token_ids), 1)
        return self._counts, self._penalties

    def applies_to(self, rows: Sequence[int], positions: Sequence[int]) -> list[int]:
        if self._counts is None:
            return []
        return np.flatnonzero(self._counted[rows] >= 0).tolist()

    def prepare(self, at: LogitsRows) -> None: ...

    def process(self, logits: Tensor, at: LogitsRows) -> None:
        if not self.applies_to(at.rows, at.positions):
            return
        counts, penalties = self._tables()
        uncertain = self._count(at)
        token_ids = self._token_ids[at.row_index, : max(at.positions)]
        own = counts[at.row_index.unsqueeze(1), token_ids]
        if uncertain is not None:
            index, rows, positions = uncertain
            tokens = self._token_ids[rows, positions].unsqueeze(1)
            own.index_add_(0, index, (token_ids[index] == tokens).int())
        repetition, presence, frequency = penalties[at.row_index].unbind(1)
        self._ops.sampling.penalize(
            logits, token_ids, at.position, own, repetition, presence, frequency
        )

    def _count(self, at: LogitsRows) -> Tensor | None:
        """Count the output before each row's first position of this step: it is the row's for good.

        Returns (logits row, row, position) of what else stands before later ones.
        """
        rows, positions = np.array([at.rows, at.positions])
        is_first = np.append(True, rows[1:] != rows[:-1])
        firsts = np.flatnonzero(is_first)
        first = positions[firsts][np.cumsum(is_first) - 1]
        counted = self._counted[rows]
        known, uncounted = ranges(
            np.where(is_first & (counted >= 0), counted, positions), positions
        )
        self._counted[rows[firsts]] = np.where(counted[firsts] >= 0, positions[firsts], -1)
        if len(known):
            assert self._counts is not None
            own_rows, own_positions = self._tensor(np.stack((rows[known], uncounted)))
            where = own_rows, self._token_ids[own_rows, own_positions]
            one = torch.ones((), dtype=torch.int32, device=self._device)
            self._counts.index_put_(where, one, accumulate=True)
        later, uncertain = ranges(np.where(counted >= 0, first, positions), positions)
        return self._tensor(np.stack((later, rows[later], uncertain))) if len(later) else None

    def _tensor(self, values: Sequence[object] | np.ndarray) -> Tensor:
        return to_device(values, torch.int64, self._device)
