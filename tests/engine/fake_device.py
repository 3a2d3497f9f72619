"""A model runner without a model, which checks that every token finds its past in the cache.

What it stores for a token is the token's whole prefix, for that is what keys and values depend on.
Before it samples, it reads the prefix back through the block table: a block handed on too early,
cached under a wrong name or written by the wrong request is found out at once.
"""

import zlib
from collections.abc import Sequence

from engine.schedule.step import StepPlan, StepResult


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

    def __init__(self, block_size: int, vocab_size: int) -> None:
        self._block_size = block_size
        self._vocab_size = vocab_size
        self._slots: dict[tuple[int, int], tuple[int, ...]] = {}  # (block, offset) -> prefix
        self._tokens: dict[int, dict[int, int]] = {}  # row -> position -> token
        self._tables: dict[int, list[int]] = {}  # row -> block table
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
                    self._slots[copy.block, offset] = prefix
        for new in plan.new_rows:
            self._tokens[new.row] = dict(enumerate(new.token_ids))
            self._tables[new.row] = list(new.block_table)
            self._computed[new.row] = len(new.block_table) * self._block_size
        for row in plan.scheduled:
            table = self._tables[row.row]
            assert row.num_held_blocks == len(table), "the device's block table has another length"
            table += row.new_blocks
            assert row.start == self._computed[row.row], "tokens are computed twice or left out"
            self._computed[row.row] += row.num_tokens
            for position in range(row.start, row.start + row.num_tokens):
                self._slots[self._slot(row.row, position)] = self._prefix(row.row, position + 1)
        sampled = []
        for row in plan.scheduled:  # all writes of a step come before its reads
            end = row.start + row.num_tokens
            for position in range(end):
                assert self._slots[self._slot(row.row, position)] == self._prefix(
                    row.row, position + 1
                ), "the cache holds another text than the request's"
            if row.num_sampled:
                token = next_token(self._prefix(row.row, end), self._vocab_size)
                self._tokens[row.row][end] = token
                sampled.append([token])
        return StepResult(sampled)

    def content(self, block: int) -> list[tuple[int, ...] | None]:
        """What a block holds: the prefix stored at each offset."""
        return [self._slots.get((block, offset)) for offset in range(self._block_size)]

    def host_content(self, slot: int) -> list[tuple[int, ...] | None]:
        return self._host[slot]

    def _slot(self, row: int, position: int) -> tuple[int, int]:
        return self._tables[row][position // self._block_size], position % self._block_size

    def _prefix(self, row: int, length: int) -> tuple[int, ...]:
        return tuple(self._tokens[row][position] for position in range(length))
