"""The blocks of sequences: a table for each group of layers that cache alike, each over its pool.

All tables of a sequence have the same length. Where a token sees only a window of those before it,
blocks that have fallen out of the window are given back; the table then has -1 in their place.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Listed
from dataclasses import dataclass

from engine.schedule.block_pool import BlockHasher, BlockPool
from engine.schedule.sequence import Sequence
from engine.schedule.step import BlockCopy, NewBlock


@dataclass(frozen=True)
class CacheGroup:
    """Layers that keep the same of their tokens, in the same number of blocks."""

    num_blocks: int
    window: int | None = None  # a token sees itself and the window - 1 before it; None: all


class BlockTables:
    """
    Args:
        groups: those that keep all tokens first. The first one's pool is what others are shown.
        max_step_tokens: most tokens that a sequence computes in one step.
        num_host_blocks: of the only group; with several, nothing is kept in host memory.
    """

    def __init__(
        self,
        groups: Listed[CacheGroup],
        hasher: BlockHasher,
        max_step_tokens: int,
        enable_prefix_caching: bool = True,
        num_host_blocks: int = 0,
    ) -> None:
        assert len(groups) == 1 or num_host_blocks == 0
        self.pools = [
            BlockPool(group.num_blocks, enable_prefix_caching, num_host_blocks) for group in groups
        ]
        self._groups = groups
        self._hasher = hasher
        self._block_size = hasher.block_size
        # Most blocks that a sequence ever holds at once.
        size = self._block_size
        self._most_held = [
            group.window and most_held(group.window, max_step_tokens, size) for group in groups
        ]

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def most_blocks(self, num_tokens: int) -> int:
        """Blocks that a sequence can have; of up to so many tokens, where windows let it have any.

        A pool that cannot hold a window and a step's tokens bounds it as others do.
        """
        bounds = [
            pool.num_blocks
            for pool, most in zip(self.pools, self._most_held, strict=True)
            if most is None or most > pool.num_blocks
        ]
        return min(bounds, default=max(self.num_blocks(num_tokens), self.pools[0].num_blocks))

    def num_new(self, sequence: Sequence, num_tokens: int) -> int:
        """Blocks that its next tokens take, in each group."""
        held = len(sequence.block_tables[0])
        return self.num_blocks(sequence.num_computed + num_tokens) - held

    def fit(self, num_blocks: int) -> bool:
        """Whether so many blocks are free in every group."""
        return all(num_blocks <= pool.num_free for pool in self.pools)

    def find_cached(self, sequence: Sequence) -> list[list[int]]:
        """A table for each group, of the longest prefix that all of them have in the cache.

        Without what falls out of a window once host memory has given what it has of the prefix.
        """
        names = self._reusable(sequence)
        length, settled = len(names), False
        while not settled:
            before = length
            for pool, group in zip(self.pools, self._groups, strict=True):
                length = self._longest(pool, group, names[:length])
            settled = length == before
        end = length + len(self.pools[0].host.lookup(names[length:]))
        tables = []
        for pool, group in zip(self.pools, self._groups, strict=True):
            first = self._first_seen(group, end * self._block_size)
            tables.append([-1] * first + pool.lookup(names[first:length]))
        return tables

    def _reusable(self, sequence: Sequence) -> list[bytes]:
        """Names of the full blocks that need not be computed if they are cached.

        They leave a token to compute, for its logits.
        """
        if sequence.wants_all_of_prompt:
            return []
        return self._names(sequence)[: (sequence.num_tokens - 1) // self._block_size]

    def _names(self, sequence: Sequence) -> list[bytes]:
        """The names of all full blocks of known tokens, extended as the tokens grow."""
        request, names = sequence.request, sequence.block_hashes
        self._hasher.extend(names, sequence.token_ids, request.cache_salt, request.cache_owner)
        return names

    def _longest(self, pool: BlockPool, group: CacheGroup, names: Listed[bytes]) -> int:
        """Most leading blocks such that this group has all that the token after them sees."""
        if group.window is None:
            return len(pool.lookup(names))
        length = run_end = len(names)
        while length > 0:  # is the run of cached blocks that ends at run_end long enough?
            if length == self._first_seen(group, run_end * self._block_size):
                return run_end
            length -= 1
            if not pool.is_cached(names[length]):
                run_end = length
        return run_end

    def _first_seen(self, group: CacheGroup, position: int) -> int:
        """The first block that a token at this position, or a later one, sees."""
        if group.window is None:
            return 0
        return max(position - group.window + 1, 0) // self._block_size

    def can_admit(
        self, sequence: Sequence, cached: Listed[Listed[int]], running: Listed[Sequence]
    ) -> bool:
        """Whether all its tokens fit next to what the running ones still need for theirs.

        One further block for each running sequence that may grow into it keeps the newcomer from
        being thrown out at the next block boundary. An idle engine takes whatever fits the pools.
        """
        num_new = [
            self.num_blocks(min(other.num_tokens + self._block_size, other.max_len))
            - len(other.block_tables[0])
            for other in running
        ]
        num_total = self.num_blocks(sequence.num_tokens)
        for pool, most, table in zip(self.pools, self._most_held, cached, strict=True):
            own = num_total - len(table)
            others = sum(num_new)
            if most is not None:
                own = min(own, most - sum(block >= 0 for block in table))
                others = sum(min(n, most) for n in num_new)
            own += sum(block >= 0 and pool.is_free(block) for block in table)
            if own + others > pool.num_free:
                return False
        return True

    def enter(self, sequence: Sequence, cached: list[list[int]]) -> int:
        """Hold the blocks that were found, and those that host memory has; returns how many have.

        The sequence then counts as computed so far.
        """
        for pool, table in zip(self.pools, cached, strict=True):
            pool.hold([block for block in table if block >= 0])
        num_found, num_restored = len(cached[0]), 0
        if len(self.pools) == 1:
            restored = self.pools[0].restore(self._reusable(sequence)[num_found:])
            num_restored = len(restored)
            cached = [cached[0] + restored]
        sequence.block_tables = [list(table) for table in cached]
        sequence.num_given_back = [table.count(-1) for table in cached]
        sequence.num_computed = (num_found + num_restored) * self._block_size
        sequence.num_published = num_found + num_restored
        return num_restored

    def trim(self, sequence: Sequence) -> None:
        """Give back the blocks that none of its tokens yet to come will see.

        Steps in flight still do; whoever gets the blocks runs later. The step that is being planned
        does not: so this comes before the sequence's next tokens are planned, and not after.
        """
        for i, (pool, group) in enumerate(zip(self.pools, self._groups, strict=True)):
            if group.window is None:
                continue
            table, done = sequence.block_tables[i], sequence.num_given_back[i]
            end = min(self._first_seen(group, sequence.num_computed), len(table))
            if end > done:
                pool.free(table[done:end])
                table[done:end] = [-1] * (end - done)
                sequence.num_given_back[i] = end

    def extend(self, sequence: Sequence, num_tokens: int) -> list[NewBlock]:
        """Append the blocks that its next tokens take to each table; returns them."""
        num_blocks = self.num_new(sequence, num_tokens)
        new: list[NewBlock] = []
        if num_blocks > 0:
            for group, (pool, table) in enumerate(
                zip(self.pools, sequence.block_tables, strict=True)
            ):
                blocks = enumerate(pool.allocate(num_blocks), len(table))
                new += [NewBlock(group, sequence.row, index, block) for index, block in blocks]
                table += [entry.block for entry in new[-num_blocks:]]
        return new

    def cut(self, sequence: Sequence) -> None:
        """Give back the blocks past its computed tokens, when fewer count than were planned."""
        length = self.num_blocks(sequence.num_computed)
        for pool, table in zip(self.pools, sequence.block_tables, strict=True):
            pool.free(table[length:])
            del table[length:]

    def publish(self, sequence: Sequence) -> None:
        """Name the blocks that are full of known and computed tokens."""
        num_full = min(sequence.num_computed, len(sequence.token_ids)) // self._block_size
        if num_full <= sequence.num_published:
            return
        names = self._names(sequence)
        for pool, table in zip(self.pools, sequence.block_tables, strict=True):
            for i in range(sequence.num_published, num_full):
                if table[i] >= 0:
                    pool.publish(table[i], names[i])
        sequence.num_published = num_full

    def release(self, sequence: Sequence) -> None:
        for pool, table, done in zip(
            self.pools, sequence.block_tables, sequence.num_given_back, strict=True
        ):
            pool.free(table[done:])
        sequence.block_tables, sequence.num_given_back = [], []
        sequence.num_computed = sequence.num_published = 0

    def forget_cached(self) -> None:
        """What was planned to be in the cache may not be there: a step did not run."""
        for pool in self.pools:
            pool.forget_all()

    def take_copies(self) -> list[BlockCopy]:
        return self.pools[0].take_copies()

    def assert_invariants(self, sequences: Listed[Sequence]) -> None:
        """Assert every invariant, given all live sequences. For tests: it walks everything."""
        for i, pool in enumerate(self.pools):
            pool.assert_invariants(self._held(sequences, i))

    def _held(self, sequences: Listed[Sequence], group: int) -> Iterator[list[int]]:
        for sequence in sequences:
            if sequence.block_tables:
                yield sequence.block_tables[group][sequence.num_given_back[group] :]


def most_held(window: int, max_step_tokens: int, block_size: int) -> int:
    """Blocks that a sequence holds at most, where its tokens see a window."""
    return -(-(window - 1 + max_step_tokens) // block_size) + 1
