"""Repetition, presence and frequency penalties."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.device.transfer import to_device
from engine.sampling.processor import LogitsRows
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
        # By row with penalties: the position before which all of its output is counted.
        self._counted: dict[int, int] = {}
        # Made when the first request wants them: [rows, V] int32, how often each token is in the
        # output, and [rows, 3] float32, the repetition, presence and frequency penalties.
        self._counts: Tensor | None = None
        self._penalties: Tensor | None = None

    def enter(self, new: NewRow) -> None:
        self._counted.pop(new.row, None)
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
        if not self._counted or self._counted.keys().isdisjoint(rows):
            return []
        return [i for i, row in enumerate(rows) if row in self._counted]

    def prepare(self, at: LogitsRows) -> None: ...

    def process(self, logits: Tensor, at: LogitsRows) -> None:
        if not self.applies_to(at.rows, at.positions):
            return
        counts, penalties = self._tables()
        uncertain = self._count(at)
        token_ids = self._token_ids[at.row_index, : max(at.positions)]
        own = counts[at.row_index.unsqueeze(1), token_ids]
        if uncertain:
            index, rows, positions = self._tensor([*zip(*uncertain, strict=True)])
            tokens = self._token_ids[rows, positions].unsqueeze(1)
            own.index_add_(0, index, (token_ids[index] == tokens).int())
        repetition, presence, frequency = penalties[at.row_index].unbind(1)
        self._ops.sampling.penalize(
            logits, token_ids, at.position, own, repetition, presence, frequency
        )

    def _count(self, at: LogitsRows) -> list[tuple[int, int, int]]:
        """Count the output before each row's first position of this step: it is the row's for good.

        Returns (logits row, row, position) of what else stands before later ones.
        """
        certain, uncertain = [], []
        first: dict[int, int] = {}
        for i, (row, position) in enumerate(zip(at.rows, at.positions, strict=True)):
            if row not in self._counted:
                continue
            if row not in first:
                first[row] = position
                certain += [(row, p) for p in range(self._counted[row], position)]
                self._counted[row] = position
            uncertain += [(i, row, p) for p in range(first[row], position)]
        if certain:
            assert self._counts is not None
            rows, positions = self._tensor([*zip(*certain, strict=True)])
            where = rows, self._token_ids[rows, positions]
            one = torch.ones((), dtype=torch.int32, device=self._device)
            self._counts.index_put_(where, one, accumulate=True)
        return uncertain

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return to_device(values, torch.int64, self._device)
