"""Replicas' caches and routers without Ray, engines or time, for tests of what routing finds."""

import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle

from deployments.cached_blocks import CachedBlocks, join, short
from deployments.routing.balancer import PrefixBalancer, ReplicaReport, RoutedPrompt
from engine.schedule.block_pool import BlockHasher, BlockPool

BLOCK = 16
_SHARED, _OWN = 6, 4  # blocks of a tenant's prompts


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def report(
    sequence: int = 1, cached: Sequence[bytes] = (), uncomputed: int = 0, running: int = 0
) -> ReplicaReport:
    return ReplicaReport(
        sequence=sequence,
        block_size=BLOCK,
        num_blocks=400,
        running=running,
        waiting=0,
        uncomputed_tokens=uncomputed,
        tokens_per_s=1000.0,
        come=join(map(short, cached)),
    )


def tenants(count: int, of: int, skew: float = 0.0) -> Iterator[int]:
    """Who asks, one after another: by a power law."""
    weights = [1 / (i + 1) ** skew for i in range(of)]
    return iter(random.Random(0).choices(range(of), weights, k=count))


class _Cache:
    def __init__(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.pool.changes = []
        self.blocks = CachedBlocks()

    def serve(self, names: list[bytes]) -> int:
        """Returns how many of the prompt's blocks are found."""
        table = self.pool.lookup(names)
        num_found = len(table)
        self.pool.hold(table)
        table += self.pool.allocate(len(names) - num_found)
        for block, name in zip(table, names, strict=True):
            self.pool.publish(block, name)
        self.pool.free(table)
        assert self.pool.changes is not None
        for name, is_cached in self.pool.changes:
            self.blocks.note(name, is_cached)
        self.pool.changes.clear()
        return num_found


class Fleet:
    """Every prompt is a tenant's beginning and an end of its own; the oracle is one large cache."""

    def __init__(
        self,
        replicas: int,
        num_blocks: int,
        routers: int = 1,
        isolate: bool = False,
        seconds_between: float = 1.0,
        loads: int = BLOCK,
    ) -> None:
        """
        Args:
            loads: differ by up to so many tokens; less than the blocks to find make.
        """
        self.num_hits = self.num_oracle_hits = 0
        self._clock, self._draw = Clock(), random.Random(0)
        self._isolate, self._seconds = isolate, seconds_between
        self._num_blocks = num_blocks
        self._hasher = BlockHasher(BLOCK, b"key")
        self._caches = {f"replica {i}": _Cache(num_blocks) for i in range(replicas)}
        self._oracle = _Cache(num_blocks * replicas)
        self._routers = [PrefixBalancer(self._clock) for _ in range(routers)]
        for router in self._routers:
            router.keep(self._caches)
        self._num_reports = 0
        self._loads = loads
        self._report()

    def serve(self, asking: Iterable[int]) -> None:
        for tenant, router in zip(asking, cycle(self._routers), strict=False):
            tokens = [tenant] * _SHARED * BLOCK
            tokens += [self._draw.randrange(1000) for _ in range(_OWN * BLOCK)]
            plain: list[bytes] = []
            self._hasher.extend(plain, tokens)
            names: list[bytes] = []
            self._hasher.extend(names, tokens, owner=f"{tenant}" if self._isolate else "")
            prompt = RoutedPrompt([short(name) for name in plain], len(tokens), BLOCK)
            self.num_hits += self._caches[router.choose(prompt)].serve(names)
            self.num_oracle_hits += self._oracle.serve(names)
            for other in self._routers:
                sent = other.take_sent()
                for listener in self._routers:
                    if listener is not other:
                        listener.note_sent(sent)
            before, self._clock.now = self._clock.now, self._clock.now + self._seconds
            if int(before) != int(self._clock.now):
                self._report()

    def _report(self) -> None:
        self._num_reports += 1
        for name, cache in self._caches.items():
            come, gone = cache.blocks.take_changes()
            told = ReplicaReport(
                sequence=self._num_reports,
                block_size=BLOCK,
                num_blocks=self._num_blocks,
                running=0,
                waiting=0,
                uncomputed_tokens=self._draw.randrange(self._loads),
                tokens_per_s=1000.0,
                follows=self._num_reports - 1 if self._num_reports > 1 else None,
                come=come,
                gone=gone,
            )
            assert all(router.take_report(name, told) for router in self._routers)
