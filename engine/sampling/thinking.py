"""Ends a model's thoughts when they have had their tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.device.transfer import to_device
from engine.sampling.processor import LogitsRows
from engine.schedule.step import NewRow


@dataclass(frozen=True)
class _Limit:
    first: int  # position of the first output token
    last: int  # position at which the end begins
    start: Tensor  # tokens that the output begins with if it thinks, on the device
    end: Tensor


class ThinkingLimits:
    """Forces `thinking_limit.end` behind so many tokens of thoughts that have not ended.

    Args:
        token_ids: [rows, max length] int64, the device's table of tokens.
    """

    def __init__(self, token_ids: Tensor) -> None:
        self._token_ids = token_ids
        self._limits: dict[int, _Limit] = {}

    def enter(self, new: NewRow) -> None:
        self._limits.pop(new.row, None)
        limit = new.params.thinking_limit
        if limit is not None:
            first = new.num_prompt_tokens
            start, end = self._tensor(limit.start), self._tensor(limit.end)
            self._limits[new.row] = _Limit(first, first + limit.budget, start, end)

    def applies_to(self, rows: Sequence[int], positions: Sequence[int]) -> list[int]:
        if not self._limits:
            return []
        return [
            i for i, at in enumerate(zip(rows, positions, strict=True)) if self._forced(*at) >= 0
        ]

    def _forced(self, row: int, position: int) -> int:
        """Which token of the end, if the thoughts go on for so long; -1 for none."""
        limit = self._limits.get(row)
        if limit is None or not 0 <= position - limit.last < len(limit.end):
            return -1
        return position - limit.last

    def prepare(self, at: LogitsRows) -> None: ...

    def process(self, logits: Tensor, at: LogitsRows) -> None:
        for i in self.applies_to(at.rows, at.positions):
            row = at.rows[i]
            limit = self._limits[row]
            end = limit.end[self._forced(row, at.positions[i])]
            # A tensor: nothing here waits for the device.
            token = torch.arange(logits.shape[1], device=logits.device) == end
            forced = torch.where(token, 0.0, -torch.inf)
            logits[i] = torch.where(self._goes_on(row, limit), forced, logits[i])

    def _goes_on(self, row: int, limit: _Limit) -> Tensor:
        """Whether the output thinks, and has not ended that before its limit."""
        output = self._token_ids[row, limit.first : limit.last]
        size = len(limit.end)
        if len(output) < len(limit.start):
            return torch.zeros((), dtype=torch.bool, device=output.device)
        begins = (output[: len(limit.start)] == limit.start).all()
        if len(output) < size:
            return begins
        return begins & ~(output.unfold(0, size, 1) == limit.end).all(1).any()

    def _tensor(self, tokens: Sequence[int]) -> Tensor:
        return to_device(tokens, torch.int64, self._token_ids.device)
