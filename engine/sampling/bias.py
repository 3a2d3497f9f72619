"""Additions to logits: logit_bias, and the ban of what would end an output before min_tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.device.transfer import to_device
from engine.sampling.processor import LogitsRows, RowRules
from engine.schedule.step import NewRow

_NEVER = 2**62  # a position that no row reaches


@dataclass(frozen=True)
class _Additions:
    """E of them, for one logits row or, where `index` says for which, for several."""

    index: Tensor  # [E] int64
    token: Tensor  # [E] int64
    value: Tensor  # [E] float32
    until: Tensor  # [E] int64: the first position at which it does not apply any more
    expires: int  # the first position at which none applies any more


class LogitBias:
    """
    Args:
        eos_token_ids: banned, with a request's own stop tokens, before its min_tokens.
    """

    def __init__(self, eos_token_ids: frozenset[int], device: torch.device) -> None:
        self._eos_token_ids = eos_token_ids
        self._device = device
        self._rules: RowRules[_Additions, _Additions] = RowRules(_combine)

    def enter(self, new: NewRow) -> None:
        params = new.params
        additions = [(token, value, _NEVER) for token, value in params.logit_bias.items()]
        if params.min_tokens > 0:
            ends = params.end_tokens(self._eos_token_ids)
            until = new.num_prompt_tokens + params.min_tokens
            additions += [(token, -torch.inf, until) for token in sorted(ends)]
        self._rules.enter(new.row, self._on_device(additions) if additions else None)

    def _on_device(self, additions: Sequence[tuple[int, float, int]]) -> _Additions:
        tokens, values, until = zip(*additions, strict=True)
        return _Additions(
            index=to_device([0] * len(additions), torch.int64, self._device),
            token=to_device(tokens, torch.int64, self._device),
            value=to_device(values, torch.float32, self._device),
            until=to_device(until, torch.int64, self._device),
            expires=max(until),
        )

    def applies_to(self, rows: Sequence[int], positions: Sequence[int]) -> list[int]:
        return [
            i for i in self._rules.applies_to(rows) if positions[i] < self._rules[rows[i]].expires
        ]

    def prepare(self, at: LogitsRows) -> None: ...

    def process(self, logits: Tensor, at: LogitsRows) -> None:
        additions = self._rules.combined(at.rows)
        if additions is not None:
            applies = at.position[additions.index] < additions.until
            values = torch.where(applies, additions.value, 0.0)
            logits.index_put_((additions.index, additions.token), values, accumulate=True)


def _combine(rules: Sequence[_Additions | None]) -> _Additions:
    parts = [(i, rule) for i, rule in enumerate(rules) if rule is not None]
    return _Additions(
        index=torch.cat([rule.index + i for i, rule in parts]),
        token=torch.cat([rule.token for _, rule in parts]),
        value=torch.cat([rule.value for _, rule in parts]),
        until=torch.cat([rule.until for _, rule in parts]),
        expires=max(rule.expires for _, rule in parts),
    )
