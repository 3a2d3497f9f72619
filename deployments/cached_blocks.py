"""The blocks that an engine has cached, by the names that routers know, and how they change."""

from collections import Counter
from collections.abc import Iterable

# Bytes of a block's name that routers are told: of the hash of its tokens and salt, which a router
# computes too, without the owner, whom it does not know. A router that is wrong about a block loses
# a cache hit, nothing else.
HASH_BYTES = 8


def short(block_hash: bytes) -> bytes:
    return block_hash[:HASH_BYTES]


def join(names: Iterable[bytes]) -> bytes:
    """Short names, end to end."""
    return b"".join(names)


def split(joined: bytes) -> list[bytes]:
    return [joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES)]


class CachedBlocks:
    """Those of one engine. What several owners have of the same tokens is one block here."""

    def __init__(self) -> None:
        self._num_owners: Counter[bytes] = Counter()  # by short name
        self._changes: dict[bytes, bool] = {}  # since they were last taken

    def note(self, block_hash: bytes, is_cached: bool) -> None:
        """The engine has cached a block, or evicted it."""
        name = short(block_hash)
        before = self._num_owners[name]
        after = before + (1 if is_cached else -1)
        self._num_owners[name] = after
        if after <= 0:
            del self._num_owners[name]
        # Come and gone again, or gone and come, is no change.
        if (before > 0) != (after > 0) and self._changes.pop(name, is_cached) == is_cached:
            self._changes[name] = is_cached

    def names(self) -> bytes:
        return join(self._num_owners)

    def take_changes(self) -> tuple[bytes, bytes]:
        """Names that have come, and gone, since the last call."""
        changes, self._changes = self._changes, {}
        come = join(name for name, is_cached in changes.items() if is_cached)
        return come, join(name for name, is_cached in changes.items() if not is_cached)
