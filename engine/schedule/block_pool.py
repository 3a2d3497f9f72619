"""The KV cache's blocks: who holds them, what they contain, which is reused next.

A block is free when no table holds it. Free blocks keep their content and their name in the hash
map until the space is needed, least recently used first: prefix caching costs nothing but the map.
With a `HostPool`, what is evicted then moves to host memory, and comes back when it is asked for.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from engine.schedule.host_pool import HostPool
from engine.schedule.step import BlockCopy

_DIGEST_BYTES = 16


class BlockHasher:
    """Names full blocks by all that their keys and values depend on: every token up to their end.

    The hash is cryptographic and keyed, for strangers choose the tokens: nobody can make two blocks
    of one name, so equal names can be taken for equal content.

    Args:
        key: shared by all who compare names, and a secret to all who send tokens.
    """

    def __init__(self, block_size: int, key: bytes) -> None:
        self.block_size = block_size
        self._key = key
        self._keyed = hashlib.blake2b(digest_size=_DIGEST_BYTES, key=key)

    def extend(
        self, hashes: list[bytes], tokens: Sequence[int], salt: str = "", owner: str = ""
    ) -> None:
        """Append the names of the full blocks of `tokens` that `hashes` does not cover yet.

        Requests share blocks only when their salts and their owners are equal. The owner is the end
        of a name, so that those who do not know it can compare what stands before it. Raises
        OverflowError for what is no token id.
        """
        size = self.block_size
        start, end = len(hashes) * size, len(tokens) // size * size
        if start == end:
            return
        parent = hashes[-1][:_DIGEST_BYTES] if hashes else self._root(salt)
        suffix = owner.encode("utf-8", "surrogatepass")
        uncovered = array("I", tokens[start:end])
        for i in range(0, len(uncovered), size):
            digest = self._keyed.copy()
            digest.update(parent)
            digest.update(uncovered[i : i + size])
            parent = digest.digest()
            hashes.append(parent + suffix)

    def _root(self, salt: str) -> bytes:
        """The parent of first blocks: no block's name, whatever the salt spells."""
        content = salt.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(
            content, digest_size=_DIGEST_BYTES, key=self._key, person=b"salt"
        ).digest()


class BlockPool:
    """Reference-counted block ids 0 .. num_blocks - 1."""

    def __init__(
        self, num_blocks: int, enable_prefix_caching: bool = True, num_host_blocks: int = 0
    ) -> None:
        self.num_blocks = num_blocks
        self._enable_prefix_caching = enable_prefix_caching
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self.host = HostPool(num_host_blocks)
        self._copies: list[BlockCopy] = []
        # When set to a list, collects (hash, whether it is cached now, here or in host memory) of
        # every change.
        self.changes: list[tuple[bytes, bool]] | None = None
        # Ordered by last use: the front is evicted first.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def is_free(self, block: int) -> bool:
        return block in self._free

    def occupancy(self) -> str:
        """A character per block: "." free, "c" free but cached, "o" held once, "s" shared."""
        return "".join(
            ("o" if count == 1 else "s") if count else ("." if block_hash is None else "c")
            for count, block_hash in zip(self._ref_counts, self._hashes, strict=True)
        )

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix of a chain of hashes. Holds none of them."""
        blocks = []
        for block_hash in hashes:
            block = self._cached.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def is_cached(self, block_hash: bytes) -> bool:
        return block_hash in self._cached

    def hold(self, blocks: Sequence[int]) -> None:
        """Take a reference on each block, free or held by others."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks with undefined content, evicting what they cached.

        The caller has checked `num_free`; running out raises KeyError and would be a bug.
        """
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def restore(self, hashes: Iterable[bytes]) -> list[int]:
        """Take a block for each of the longest prefix of a chain of hashes that the host holds.

        They will have their content when the plan of this step runs. The caller has checked that
        there are as many free blocks as hashes.
        """
        found = self.host.lookup(hashes)
        with self.host.pinned(found) as slots:
            blocks = self.allocate(len(found))  # after copies of what they cached, if that is kept
            self._copies += [BlockCopy(False, *pair) for pair in zip(blocks, slots, strict=True)]
        for block, block_hash in zip(blocks, found, strict=True):
            self.publish(block, block_hash)
        return blocks

    def take_copies(self) -> list[BlockCopy]:
        """What has to be copied before the step that is being planned, in this order."""
        copies, self._copies = self._copies, []
        return copies

    def publish(self, block: int, block_hash: bytes) -> None:
        """Name a held, full block for later requests to find. The first of equals stays."""
        if self._enable_prefix_caching and block_hash not in self._cached:
            self._forget(block)
            self._cached[block_hash] = block
            self._hashes[block] = block_hash
            if block_hash not in self.host:
                self._note(block_hash, True)

    def free(self, blocks: Sequence[int]) -> None:
        """Give back one reference on each block of a table.

        The table's end becomes the older: a prefix is worth more than what follows it.
        """
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                self._free[block] = None

    def forget_all(self) -> None:
        """Nothing counts as cached any more, here or in host memory."""
        names = {*self._cached, *self.host.clear()}
        self._cached.clear()
        self._hashes = [None] * self.num_blocks
        self._copies.clear()
        for block_hash in names:
            self._note(block_hash, False)

    def _forget(self, block: int) -> None:
        """Evict what a block caches: to host memory, if there is room."""
        old_hash = self._hashes[block]
        if old_hash is None:
            return
        del self._cached[old_hash]
        self._hashes[block] = None
        stored = self.host.store(old_hash)
        if stored is not None:
            self._copies.append(BlockCopy(True, block, stored.slot))
            if stored.replaced is not None and stored.replaced not in self._cached:
                self._note(stored.replaced, False)
        if old_hash not in self.host:
            self._note(old_hash, False)

    def _note(self, block_hash: bytes, is_cached: bool) -> None:
        if self.changes is not None:
            self.changes.append((block_hash, is_cached))

    def assert_invariants(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert every invariant, given all live block tables. For tests: it walks everything."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        assert held == self._ref_counts, "a reference count differs from the tables holding it"
        free = {block for block, count in enumerate(held) if count == 0}
        assert free == set(self._free), "free blocks are not exactly those no table holds"
        for block_hash, block in self._cached.items():
            assert self._hashes[block] == block_hash, "hash map and block disagree"
        named = sum(block_hash is not None for block_hash in self._hashes)
        assert named == len(self._cached), "a block has a name the map does not know"
        self.host.assert_invariants()
