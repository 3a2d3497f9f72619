"""Which replica gets a request: the one where prompt and queue together cost least. No Ray here.

Replicas report which blocks they really hold and how much they have to do. Between reports, which
are a second old or more, a router adds what it has sent and takes off what has been worked off.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Bytes of a block's name that reports carry: of the hash of its tokens and salt, which a router
# computes too, without the owner, whom it does not know. A router that is wrong about a block loses
# a cache hit, nothing else.
HASH_BYTES = 8

# What a running request costs newcomers on its replica, in prompt tokens: it takes part in every
# step until it ends. A cached prefix attracts requests until this evens it out.
RUNNING_COST_TOKENS = 48

# A sticky session moves when its replica has this many times the least load, plus a prompt's worth.
_SESSION_OVERLOAD = 2.0
_SESSION_SLACK_TOKENS = 4096


@dataclass(frozen=True)
class ReplicaReport:
    """What a replica says of itself; plain data, as it goes through Serve's controller."""

    sequence: int  # grows with every report of a replica
    block_size: int
    running: int
    waiting: int
    uncomputed_tokens: int  # of prompts: waiting, or only partly computed
    tokens_per_s: float  # how fast it computes prompts
    hashes: bytes  # HASH_BYTES of each cached block's hash, end to end

    def load_tokens(self) -> int:
        """Work ahead of a newcomer, in prompt tokens."""
        return self.uncomputed_tokens + (self.running + self.waiting) * RUNNING_COST_TOKENS


@dataclass(frozen=True)
class RoutedPrompt:
    """What is known of a prompt before a replica has it."""

    hashes: Sequence[bytes] = ()  # of its full blocks, as `short` cuts them; empty when unknown
    num_tokens: int = 0
    block_size: int = 1


def short(block_hash: bytes) -> bytes:
    return block_hash[:HASH_BYTES]


def pack_hashes(cached: Iterable[bytes]) -> bytes:
    """Cached blocks for a report; those of several owners with the same tokens are one there."""
    return b"".join({short(block_hash) for block_hash in cached})


_UNKNOWN = RoutedPrompt()


@dataclass
class _Replica:
    sequence: int = -1
    load_tokens: float = 0.0  # at the time of `load_at`
    load_at: float = 0.0
    tokens_per_s: float = 1.0
    reported: frozenset[bytes] = frozenset()
    # Blocks sent here, with the report they followed: the next one may not show them yet.
    sent: dict[bytes, int] = field(default_factory=dict)

    def take_report(self, report: ReplicaReport, now: float) -> None:
        if report.sequence == self.sequence:
            return
        self.sequence = report.sequence
        self.load_tokens, self.load_at = report.load_tokens(), now
        self.tokens_per_s = report.tokens_per_s
        self.reported = frozenset(
            report.hashes[i : i + HASH_BYTES] for i in range(0, len(report.hashes), HASH_BYTES)
        )
        # What was sent before the previous report is in this one, or already evicted.
        self.sent = {h: after for h, after in self.sent.items() if after >= report.sequence - 1}

    def count_hits(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks of the prompt that are, or are about to be, cached here."""
        for i, block_hash in enumerate(hashes):
            if block_hash not in self.reported and block_hash not in self.sent:
                return i
        return len(hashes)

    def load(self, now: float) -> float:
        """Tokens of work ahead: what was known, less what has been worked off since."""
        return max(self.load_tokens - (now - self.load_at) * self.tokens_per_s, 0.0)

    def note_sent(self, hashes: Iterable[bytes], tokens: float, now: float) -> None:
        self.sent.update(dict.fromkeys(hashes, self.sequence))
        self.load_tokens, self.load_at = self.load(now) + tokens, now


class PrefixBalancer:
    """The state of one router. Several routers agree as far as the replicas' reports go."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._clock = clock

    def update(self, reports: Mapping[str, ReplicaReport | None]) -> None:
        """The replicas there are now, with their latest reports; None where none has come yet."""
        for name in set(self._replicas) - set(reports):
            del self._replicas[name]
        for name, report in reports.items():
            replica = self._replicas.setdefault(name, _Replica())
            if report is not None:
                replica.take_report(report, self._clock())

    def choose(self, prompt: RoutedPrompt = _UNKNOWN, session: str = "") -> str:
        """The replica for a prompt; raises LookupError when there is none.

        Requests of one `session` stay together while that costs little.
        """
        if not self._replicas:
            raise LookupError("there is no replica")
        now = self._clock()
        costs = {}
        for name, replica in self._replicas.items():
            hits = replica.count_hits(prompt.hashes) * prompt.block_size
            uncached = max(prompt.num_tokens - hits, 0)
            costs[name] = (replica.load(now) + uncached, uncached)
        # Equal costs go to the same replica for the same prompt, and spread over all prompts.
        salt = session or (prompt.hashes[0].hex() if prompt.hashes else "")
        ranked = sorted(costs, key=lambda name: (costs[name][0], _rank(salt, name)))
        chosen = ranked[0]
        if session:
            home = max(costs, key=lambda name: _rank(session, name))
            limit = costs[chosen][0] * _SESSION_OVERLOAD + _SESSION_SLACK_TOKENS
            chosen = home if costs[home][0] <= limit else chosen
        self._replicas[chosen].note_sent(prompt.hashes, costs[chosen][1] + RUNNING_COST_TOKENS, now)
        return chosen


def _rank(key: str, name: str) -> bytes:
    """Rendezvous hashing (Thaler and Ravishankar, 1998): routers agree without talking."""
    return hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=8).digest()


def report_from_stats(stats: Mapping[str, Any] | None) -> ReplicaReport | None:
    """A replica's report out of Serve's routing stats; None while there is none."""
    return ReplicaReport(**stats["manta"]) if stats and "manta" in stats else None
