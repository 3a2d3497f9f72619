"""A model runner without a model, which checks that every token finds its past in the cache.

What it stores for a token is the token's whole prefix, for that is what keys and values depend on.
Before it samples, it reads the prefix back through the block table: a block handed on too early,
cached under a wrong name or written by the wrong request is found out at once.
"""

import zlib
from collections.abc import Sequence

from engine.schedule.step import ScheduledRow, StepPlan, StepResult, count_accepted


def next_token(tokens: Sequence[int], vocab_size: int) -> int:
    """The model: a pure function of everything before the token."""
    return zlib.crc32(bytes(tokens)) % vocab_size


def continuation(
    prompt: Sequence[int], vocab_size: int, num_tokens: int, eos_token_ids: Sequence[int] = ()
) -> list[int]:
    """What the model makes of a prompt, up to and including the first EOS."""
    output: list[int] = []
    while len(output) < num_tokens and not (output and output[-1] in eos_token_ids):
        output.append(next_token([*prompt, *output], vocab_size))
    return output


class FakeDevice:
    """Executes plans in order, with tables per row as the real one has."""

    def __init__(
        self, block_size: int, vocab_size: int, windows: Sequence[int | None] = (None,)
    ) -> None:
        """
        Args:
            windows: by cache group, how many tokens a token sees, with itself; None: all.
        """
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._windows = windows
        # (group, block, offset) -> prefix
        self._slots: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self._tokens: dict[int, dict[int, int]] = {}  # row -> position -> token
        self._tables: dict[int, list[list[int]]] = {}  # row -> block table of each group
        self._computed: dict[int, int] = {}  # row -> tokens whose prefix is in the cache
        self._host: dict[int, list[tuple[int, ...] | None]] = {}  # slot -> content of a block

    def execute(self, plan: StepPlan) -> StepResult:
        for copy in plan.copies:
            if copy.to_host:
                self._host[copy.slot] = self.content(copy.block)
                assert None not in self._host[copy.slot], "a block is stored that was never full"
            else:
                for offset, prefix in enumerate(self._host[copy.slot]):
                    assert prefix is not None
                    self._slots[0, copy.block, offset] = prefix
        for new in plan.new_rows:
            self._tokens[new.row] = dict(enumerate(new.token_ids))
            self._tables[new.row] = [list(table) for table in new.block_tables]
            self._computed[new.row] = len(new.block_tables[0]) * self._block_size
        drafts = {draft.row: draft for draft in plan.drafts}
        for draft in plan.drafts:
            self._tokens[draft.row].update(enumerate(draft.token_ids, draft.position))
        for new_block in plan.new_blocks:
            table = self._tables[new_block.row][new_block.group]
            assert new_block.place == len(table), "the device's table has another length"
            table.append(new_block.block)
        for row in plan.scheduled:
            assert row.start == self._computed[row.row], "tokens are computed twice or left out"
            self._computed[row.row] += row.num_tokens
            for group in range(len(self._windows)):
                for position in range(row.start, row.start + row.num_tokens):
                    slot = self._slot(row.row, group, position)
                    self._slots[slot] = self._prefix(row.row, position + 1)
        sampled = [self._sample(row) for row in plan.scheduled if self._reads(row)]
        for row, tokens in zip([r for r in plan.scheduled if r.num_sampled], sampled, strict=True):
            self._tokens[row.row].update(enumerate(tokens, row.end - row.num_sampled + 1))
            own = drafts[row.row].token_ids if row.row in drafts else ()
            assert row.num_sampled == len(own) + 1
            num_rejected = len(own) - count_accepted(own, tokens)
            if num_rejected:  # the blocks past its tokens are given back
                self._computed[row.row] -= num_rejected
                for table in self._tables[row.row]:
                    del table[-(-self._computed[row.row] // self._block_size) :]
        return StepResult(sampled)

    def forget(self) -> None:
        """Nothing that was stored is there."""
        self._slots.clear()
        self._host.clear()

    def _reads(self, row: ScheduledRow) -> bool:
        """After all writes of the step: what the row's tokens see is there. Whether it samples."""
        for group, window in enumerate(self._windows):
            first = 0 if window is None else max(row.start - window + 1, 0)
            for position in range(first, row.end):
                held = self._slots[self._slot(row.row, group, position)]
                assert held == self._prefix(row.row, position + 1), (
                    "the cache holds another text than the request's"
                )
        return row.num_sampled > 0

    def _sample(self, row: ScheduledRow) -> list[int]:
        ends = range(row.end - row.num_sampled + 1, row.end + 1)
        return [next_token(self._prefix(row.row, end), self._vocab_size) for end in ends]

    def content(self, block: int, group: int = 0) -> list[tuple[int, ...] | None]:
        """What a block holds: the prefix stored at each offset."""
        return [self._slots.get((group, block, offset)) for offset in range(self._block_size)]

    def host_content(self, slot: int) -> list[tuple[int, ...] | None]:
        return self._host[slot]

    def _slot(self, row: int, group: int, position: int) -> tuple[int, int, int]:
        block = self._tables[row][group][position // self._block_size]
        assert block >= 0, "a token needs a block that its request does not hold"
        return group, block, position % self._block_size

    def _prefix(self, row: int, length: int) -> tuple[int, ...]:
        return tuple(self._tokens[row][position] for position in range(length))
