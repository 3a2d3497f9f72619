"""What requests may ask to have done to their logits before a token is drawn.

Penalties, biases and bans, for the rows that ask for any, all of them in one go. A row's rules are
put on the device when it enters; what they depend on (tokens so far, how often each has come)
lies in tables there, so that a step that is planned ahead needs no token on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.step import NewRow, ScheduledRow
from engine.transfer import to_device
from kernels import Ops

_NEVER = 2**62  # a position that no row reaches
_NO_PENALTIES = (1.0, 0.0, 0.0)  # repetition, presence, frequency


@dataclass(frozen=True)
class _Rules:
    """What one row wants, or what several want: entry e belongs to row index[e] of the batch.

    E additions to logits, W bad words of up to P tokens before the last one.
    """

    index: Tensor  # [E] int64
    token: Tensor  # [E] int64
    value: Tensor  # [E] float32
    until: Tensor  # [E] int64: the first position at which it does not apply any more
    word_index: Tensor  # [W] int64
    word_prefix: Tensor  # [W, P] int64, -1 before its beginning
    word_last: Tensor  # [W] int64
    num_prompt: Tensor  # [N] int64
    allowed: Tensor | None  # [N, ceil(V / 32)] int32, as kernels.reference.apply_bitmask has it
    penalized: bool
    expires: int  # the first position at which nothing of it applies any more


class LogitsProcessor:
    """Knows, for each row that wants anything, its rules.

    Args:
        token_ids: [rows, max length] int64, the device's table of tokens.
        eos_token_ids: banned, with a request's own stop tokens, before its min_tokens.
    """

    def __init__(
        self, token_ids: Tensor, vocab_size: int, eos_token_ids: frozenset[int], ops: Ops
    ) -> None:
        self._token_ids = token_ids
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._ops = ops
        self._device = token_ids.device
        self._rules: dict[int, _Rules] = {}
        self._combined: tuple[list[int], _Rules] | None = None  # of the rows of the last step
        # Made when the first request wants them: [rows, V] int32, how often each token is in the
        # output, and [rows, 3] float32, the repetition, presence and frequency penalties.
        self._counts: Tensor | None = None
        self._penalties: Tensor | None = None

    def enter(self, new: NewRow) -> None:
        """A request enters a row; what the row held before is gone."""
        self._combined = None
        rules = self._make_rules(new)
        if rules is None:
            self._rules.pop(new.row, None)
        else:
            self._rules[new.row] = rules
        if new.params.has_penalties:
            self._enter_penalties(new)
        elif self._penalties is not None:
            self._penalties[new.row] = self._floats(_NO_PENALTIES)

    def concerned(self, sampling: Sequence[ScheduledRow]) -> list[int]:
        """Which of the rows want anything done for their next tokens, by index."""
        rules = self._rules
        if not rules or rules.keys().isdisjoint([row.row for row in sampling]):
            return []
        return [
            i
            for i, row in enumerate(sampling)
            if row.row in rules and row.end < rules[row.row].expires
        ]

    def process(
        self,
        logits: Tensor,
        rows: list[int],
        positions: list[int],
        grammar_mask: Tensor | None = None,
    ) -> None:
        """Change logits [N, V] float32 in place, for the tokens of N rows at N positions.

        The order is vLLM's: what is allowed, biases and bans, then penalties.

        Args:
            grammar_mask: what the rows' grammars allow, as kernels.reference.apply_bitmask has it.
        """
        rules = self._combine(rows)
        row_index, position = self._tensor(rows), self._tensor(positions)
        if grammar_mask is not None:
            self._ops.sampling.apply_bitmask(
                logits, grammar_mask.to(self._device, non_blocking=True)
            )
        if rules.allowed is not None:
            self._ops.sampling.apply_bitmask(logits, rules.allowed)
        if len(rules.token):
            active = position[rules.index] < rules.until
            values = torch.where(active, rules.value, 0.0)
            logits.index_put_((rules.index, rules.token), values, accumulate=True)
        if len(rules.word_last):
            self._ban_words(logits, rules, row_index, position)
        if rules.penalized:
            assert self._counts is not None and self._penalties is not None
            token_ids = self._token_ids[row_index, : max(positions)]
            counts = self._counts[row_index.unsqueeze(1), token_ids]
            repetition, presence, frequency = self._penalties[row_index].unbind(1)
            self._ops.sampling.penalize(
                logits, token_ids, position, counts, repetition, presence, frequency
            )

    def count(self, rows: Tensor, tokens: Tensor) -> None:
        """These rows, [N] int64, have had these tokens, [N] int64."""
        if self._counts is not None:
            self._counts[rows, tokens] += 1

    def _ban_words(self, logits: Tensor, rules: _Rules, rows: Tensor, position: Tensor) -> None:
        """Ban the last token of every word whose others the output ends with."""
        index, prefix = rules.word_index, rules.word_prefix
        before = torch.arange(-prefix.shape[1], 0, device=self._device)
        at = position[index].unsqueeze(1) + before
        ends = self._token_ids[rows[index].unsqueeze(1), at.clamp(min=0)]
        is_output = at >= rules.num_prompt[index].unsqueeze(1)
        matches = ((prefix < 0) | ((ends == prefix) & is_output)).all(1)
        values = torch.where(matches, -torch.inf, 0.0)
        logits.index_put_((index, rules.word_last), values, accumulate=True)

    def _make_rules(self, new: NewRow) -> _Rules | None:
        params = new.params
        additions = [(token, value, _NEVER) for token, value in params.logit_bias.items()]
        if params.min_tokens > 0:
            stops = set(params.stop_token_ids)
            if not params.ignore_eos:
                stops |= self._eos_token_ids
            until = new.num_prompt_tokens + params.min_tokens
            additions += [(token, -torch.inf, until) for token in sorted(stops)]
        words = params.bad_words_token_ids
        allowed = params.allowed_token_ids
        lasting = words or allowed or params.has_penalties or params.structured_outputs
        if not (additions or lasting):
            return None
        width = max((len(word) - 1 for word in words), default=0)
        return _Rules(
            index=self._tensor([0] * len(additions)),
            token=self._tensor([token for token, _, _ in additions]),
            value=self._floats([value for _, value, _ in additions]),
            until=self._tensor([until for _, _, until in additions]),
            word_index=self._tensor([0] * len(words)),
            word_prefix=self._tensor(
                [[-1] * (width + 1 - len(word)) + word[:-1] for word in words]
            ).reshape(len(words), width),
            word_last=self._tensor([word[-1] for word in words]),
            num_prompt=self._tensor([new.num_prompt_tokens]),
            allowed=None if allowed is None else self._bitmask(allowed).unsqueeze(0),
            penalized=params.has_penalties,
            expires=_NEVER if lasting else max(until for _, _, until in additions),
        )

    def _combine(self, rows: list[int]) -> _Rules:
        """The rules of a step's rows as one; in the steps of decoding they stay the same."""
        if self._combined is None or self._combined[0] != rows:
            self._combined = rows, self._concatenate([self._rules[row] for row in rows])
        return self._combined[1]

    def _concatenate(self, parts: Sequence[_Rules]) -> _Rules:
        width = max(part.word_prefix.shape[1] for part in parts)
        allowed = None
        if any(part.allowed is not None for part in parts):
            words = -(-self._vocab_size // 32)
            everything = torch.full((1, words), -1, dtype=torch.int32, device=self._device)
            allowed = torch.cat([everything if p.allowed is None else p.allowed for p in parts])
        return _Rules(
            index=torch.cat([part.index + i for i, part in enumerate(parts)]),
            token=torch.cat([part.token for part in parts]),
            value=torch.cat([part.value for part in parts]),
            until=torch.cat([part.until for part in parts]),
            word_index=torch.cat([part.word_index + i for i, part in enumerate(parts)]),
            word_prefix=torch.cat(
                [
                    torch.nn.functional.pad(
                        part.word_prefix, (width - part.word_prefix.shape[1], 0), value=-1
                    )
                    for part in parts
                ]
            ),
            word_last=torch.cat([part.word_last for part in parts]),
            num_prompt=torch.cat([part.num_prompt for part in parts]),
            allowed=allowed,
            penalized=any(part.penalized for part in parts),
            expires=max(part.expires for part in parts),
        )

    def _enter_penalties(self, new: NewRow) -> None:
        if self._counts is None or self._penalties is None:
            num_rows = len(self._token_ids)
            self._counts = torch.zeros(
                num_rows, self._vocab_size, dtype=torch.int32, device=self._device
            )
            self._penalties = self._floats(_NO_PENALTIES).repeat(num_rows, 1)
        params = new.params
        output = self._tensor(new.token_ids[new.num_prompt_tokens :])
        counts = self._counts[new.row].zero_()
        counts.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        self._penalties[new.row] = self._floats(
            [params.repetition_penalty, params.presence_penalty, params.frequency_penalty]
        )

    def _bitmask(self, tokens: Sequence[int]) -> Tensor:
        """[ceil(V / 32)] int32, the bits of these tokens set."""
        num_bits = -(-self._vocab_size // 32) * 32
        bits = torch.zeros(num_bits, dtype=torch.int64, device=self._device)
        bits[self._tensor(tokens)] = 1
        words = (bits.view(-1, 32) << torch.arange(32, device=self._device)).sum(1)
        return words.to(torch.int32)

    def _tensor(self, values: Sequence[object]) -> Tensor:
        return to_device(values, torch.int64, self._device)

    def _floats(self, values: Sequence[float]) -> Tensor:
        return to_device(values, torch.float32, self._device)
