"""Which blocks that the KV cache has evicted live on in host memory: names and places only."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """Where an evicted block goes, and whose content that overwrites."""

    slot: int
    replaced: bytes | None


class HostPool:
    """Slots 0 .. num_slots - 1 by the hash of what they hold, the least recently used goes first.

    Slots have no reference counts: copies run in the order in which they are planned, so a slot can
    be handed on as soon as the copy out of it is in a plan.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(reversed(range(num_slots)))
        self._pinned: frozenset[bytes] = frozenset()

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._slots

    def store(self, block_hash: bytes) -> StoredBlock | None:
        """A slot for a block; None when it is here already, or when no slot can be spared."""
        if block_hash in self._slots:
            self._slots.move_to_end(block_hash)
            return None
        replaced = None
        if not self._free:
            replaced = next((name for name in self._slots if name not in self._pinned), None)
            if replaced is None:
                return None
            self._free.append(self._slots.pop(replaced))
        slot = self._slots[block_hash] = self._free.pop()
        return StoredBlock(slot, replaced)

    def lookup(self, hashes: Iterable[bytes]) -> list[bytes]:
        """The longest prefix of a chain of hashes that is here."""
        found = []
        for block_hash in hashes:
            if block_hash not in self._slots:
                break
            found.append(block_hash)
        return found

    def clear(self) -> list[bytes]:
        """Let go of all blocks; returns what they were called."""
        names = list(self._slots)
        self._free += self._slots.values()
        self._slots.clear()
        return names

    @contextmanager
    def pinned(self, hashes: Sequence[bytes]) -> Iterator[list[int]]:
        """The slots of these blocks, which stay theirs meanwhile and count as just used."""
        self._pinned = frozenset(hashes)
        for block_hash in hashes:
            self._slots.move_to_end(block_hash)
        yield [self._slots[block_hash] for block_hash in hashes]
        self._pinned = frozenset()

    def assert_invariants(self) -> None:
        """Assert that every slot is free or of one block. For tests."""
        taken = list(self._slots.values())
        assert sorted(taken + self._free) == list(range(self.num_slots)), "a slot is lost or shared"
        assert not self._pinned, "blocks are still pinned"
