"""What may not come: tokens outside allowed_token_ids, and bad words."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.device.transfer import to_device
from engine.sampling.processor import LogitsRows, RowRules
from engine.schedule.step import NewRow
from kernels import Ops


class AllowedTokens:
    """allowed_token_ids as bit masks, as kernels.reference.apply_bitmask has them."""

    def __init__(self, vocab_size: int, device: torch.device, ops: Ops) -> None:
        self._num_words = -(-vocab_size // 32)
        self._device = device
        self._ops = ops
        self._rules: RowRules[Tensor, Tensor] = RowRules(self._combine)

    def enter(self, new: NewRow) -> None:
        allowed = new.params.allowed_token_ids
        self._rules.enter(new.row, None if allowed is None else self._bitmask(allowed))

    def _bitmask(self, tokens: Sequence[int]) -> Tensor:
        """[ceil(V / 32)] int32, the bits of these tokens set."""
        bits = torch.zeros(self._num_words * 32, dtype=torch.int64, device=self._device)
        bits[to_device(tokens, torch.int64, self._device)] = 1
        words = (bits.view(-1, 32) << torch.arange(32, device=self._device)).sum(1)
        return words.to(torch.int32)

    def _combine(self, masks: Sequence[Tensor | None]) -> Tensor:
        everything = torch.full((self._num_words,), -1, dtype=torch.int32, device=self._device)
        return torch.stack([everything if mask is None else mask for mask in masks])

    def applies_to(self, rows: Sequence[int], positions: Sequence[int]) -> list[int]:
        return self._rules.applies_to(rows)

    def prepare(self, at: LogitsRows) -> None: ...

    def process(self, logits: Tensor, at: LogitsRows) -> None:
        mask = self._rules.combined(at.rows)
        if mask is not None:
            self._ops.sampling.apply_bitmask(logits, mask)


@dataclass(frozen=True)
class _Words:
    """W words of up to P tokens before the last one; word w is banned from logits row index[w]."""

    index: Tensor  # [W] int64
    prefix: Tensor  # [W, P] int64, -1 before its beginning
    last: Tensor  # [W] int64
    num_prompt: Tensor  # [W] int64, prompt tokens of the row


class BadWords:
    """Bans the last token of every word whose others the output ends with.

    Args:
        token_ids: [rows, max length] int64, the device's table of tokens.
    """

    def __init__(self, token_ids: Tensor) -> None:
        self._token_ids = token_ids
        self._rules: RowRules[_Words, _Words] = RowRules(_combine_words)

    def enter(self, new: NewRow) -> None:
        words = new.params.bad_words_token_ids
        self._rules.enter(new.row, self._on_device(words, new.num_prompt_tokens) if words else None)

    def _on_device(self, words: Sequence[list[int]], num_prompt: int) -> _Words:
        width = max(len(word) - 1 for word in words)
        prefixes = [[-1] * (width + 1 - len(word)) + word[:-1] for word in words]
        return _Words(
            index=self._tensor([0] * len(words)),
            prefix=self._tensor(prefixes).reshape(len(words), width),
            last=self._tensor([word[-1] for word in words]),
            num_prompt=self._tensor([num_prompt] * len(words)),
        )

    def applies_to(self, rows: Sequence[int], positions: Sequence[int]) -> list[int]:
        return self._rules.applies_to(rows)

    def prepare(self, at: LogitsRows) -> None: ...

    def process(self, logits: Tensor, at: LogitsRows) -> None:
        words = self._rules.combined(at.rows)
        if words is None:
            return
        before = torch.arange(-words.prefix.shape[1], 0, device=logits.device)
        positions = at.position[words.index].unsqueeze(1) + before
        rows = at.row_index[words.index].unsqueeze(1)
        ends = self._token_ids[rows, positions.clamp(min=0)]
        is_output = positions >= words.num_prompt.unsqueeze(1)
        matches = ((words.prefix < 0) | ((ends == words.prefix) & is_output)).all(1)
        values = torch.where(matches, -torch.inf, 0.0)
        logits.index_put_((words.index, words.last), values, accumulate=True)

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return to_device(values, torch.int64, self._token_ids.device)


def _combine_words(rules: Sequence[_Words | None]) -> _Words:
    parts = [(i, rule) for i, rule in enumerate(rules) if rule is not None]
    width = max(rule.prefix.shape[1] for _, rule in parts)
    pad = torch.nn.functional.pad
    return _Words(
        index=torch.cat([rule.index + i for i, rule in parts]),
        prefix=torch.cat(
            [pad(rule.prefix, (width - rule.prefix.shape[1], 0), value=-1) for _, rule in parts]
        ),
        last=torch.cat([rule.last for _, rule in parts]),
        num_prompt=torch.cat([rule.num_prompt for _, rule in parts]),
    )
