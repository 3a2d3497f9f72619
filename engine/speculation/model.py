"""A small model of the same vocabulary says how texts go on: those of all rows, step by step."""

from collections.abc import Callable

import numpy as np

from engine.schedule.sequence import Sequence
from engine.schedule.step import DraftedTokens, DraftRow
from engine.speculation.costs import MIN_GAIN, DecodeCosts, StepCosts
from engine.speculation.drafter import Draft, Drafter

_HITS, _MISSES = 3.0, 1.0  # as if it had been judged so before it begins
_DECAY = 0.98  # of what is known, with each row's drafts
_FORGIVENESS = 0.99  # of failures, with each step in which it was not asked


class ModelDrafter(Drafter):
    """
    Args:
        run: has the draft model go on with rows.
    """

    name = "model"

    def __init__(self, run: Callable[[list[DraftRow]], DraftedTokens], block_size: int) -> None:
        self._run = run
        self._block_size = block_size
        self._own_costs = StepCosts(unknown=0.0)  # of its steps, by rows
        self._hits, self._misses = _HITS, _MISSES
        self._drafts: dict[Sequence, list[int]] = {}

    @property
    def _confidence(self) -> float:
        return self._hits / (self._hits + self._misses)

    def prepare(self, sequences: list[Sequence], limit: int, costs: DecodeCosts) -> None:
        count = self._choose(len(sequences), limit, costs)
        asked = {s: self._row(s, count) for s in sequences}
        rows = {sequence: row for sequence, row in asked.items() if row.num_drafts > 0}
        self._drafts = {}
        if not rows:
            self._misses *= _FORGIVENESS
            return
        drafted = self._run(list(rows.values()))
        self._own_costs.count(len(rows), drafted.seconds)
        self._drafts = dict(zip(rows, drafted.token_ids, strict=True))

    def _choose(self, num_rows: int, limit: int, costs: DecodeCosts) -> int:
        """How many tokens to draft for each row: as many as make tokens cheapest, its own steps
        and those that check them taken together."""
        counts = np.arange(limit + 1)
        expected = (self._confidence**counts).cumsum()
        own = self._own_costs.of(num_rows)
        rates = expected / (costs.of(num_rows, num_rows * counts) + counts * own)
        rates[1:] /= MIN_GAIN
        return int(rates.argmax())

    def _row(self, sequence: Sequence, count: int) -> DraftRow:
        """Drafts follow its last token, in blocks that it holds; the last one is not computed."""
        position = sequence.num_tokens - 1
        room = len(sequence.block_tables[0]) * self._block_size - position
        count = min(count, room, sequence.max_len - sequence.num_tokens - 1)
        return DraftRow(sequence.row, position, count, sequence.num_pending)

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        tokens = self._drafts.get(sequence, [])[:limit]
        return Draft(tokens, [self._confidence] * len(tokens))

    def judge(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        self._hits = _DECAY * self._hits + num_accepted
        self._misses = _DECAY * self._misses + (num_accepted < num_drafts)

    def end(self, sequence: Sequence) -> None:
        self._drafts.pop(sequence, None)
