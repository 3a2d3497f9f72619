"""Which replica gets a request: the one where prompt and queue together cost least. No Ray here.

Replicas report which blocks they really hold and how much they have to do. Between reports, which
are a second old or more, a router adds what it has sent, and what other routers say that they have,
and takes off what has been worked off.
"""

import hashlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from deployments.cached_blocks import join, split

# What a running request costs newcomers on its replica, in prompt tokens: it takes part in every
# step until it ends. A cached prefix attracts requests until this evens it out.
RUNNING_COST_TOKENS = 48

# A sticky session moves when its replica has this many times the least load, plus a prompt's worth.
_SESSION_OVERLOAD = 2.0
_SESSION_SLACK_TOKENS = 4096

# New blocks push out old ones, which others may come back for: they cost so much more where a cache
# has taken in as many as it holds, and the least crowded one none. What was taken in counts less
# the longer ago it was, in seconds.
_CROWDING_COST = 0.5
_CROWDED_FOR_S = 60.0


@dataclass(frozen=True)
class ReplicaReport:
    """What a replica says of itself; plain data, as it goes through Ray.

    Of its cached blocks it tells what has changed since the report before, and all of them to
    those who have missed that one.
    """

    sequence: int  # grows with every report of a replica
    block_size: int
    num_blocks: int
    running: int
    waiting: int
    uncomputed_tokens: int  # of prompts: waiting, or only partly computed
    tokens_per_s: float  # how fast it computes prompts
    follows: int | None = None  # the report that it changes; None: `come` are all that are cached
    come: bytes = b""  # short names, end to end
    gone: bytes = b""

    def load_tokens(self) -> int:
        """Work ahead of a newcomer, in prompt tokens."""
        return self.uncomputed_tokens + (self.running + self.waiting) * RUNNING_COST_TOKENS


@dataclass(frozen=True)
class RoutedPrompt:
    """What is known of a prompt before a replica has it."""

    hashes: Sequence[bytes] = ()  # short names of its full blocks; empty when unknown
    num_tokens: int = 0
    # That a block which is found spares. More than are in it where the end of the prompt is not
    # known: whoever has come before with its beginning may well have come with the rest.
    tokens_per_block: float = 1


@dataclass(frozen=True)
class Sent:
    """What a router tells the others of a request."""

    replica: str
    hashes: bytes  # short names of its blocks, end to end
    tokens: float  # of work that it brings


_UNKNOWN = RoutedPrompt()


@dataclass
class _Replica:
    sequence: int = -1
    previous: int = -1
    num_blocks: int = 0
    load_tokens: float = 0.0  # at the time of `load_at`
    load_at: float = 0.0
    tokens_per_s: float = 1.0
    reported: set[bytes] = field(default_factory=set)
    # Blocks sent here, with the report they followed: the next one may not show them yet.
    sent: dict[bytes, int] = field(default_factory=dict)
    taken_in: float = 0.0  # new blocks, less the longer ago, at the time of `taken_in_at`
    taken_in_at: float = 0.0

    def take_report(self, report: ReplicaReport, now: float) -> bool:
        """Whether it could be understood."""
        if report.sequence <= self.sequence:
            return True
        if report.follows not in (None, self.sequence):
            return False
        self.previous, self.sequence = self.sequence, report.sequence
        self.num_blocks = report.num_blocks
        self.load_tokens, self.load_at = report.load_tokens(), now
        self.tokens_per_s = report.tokens_per_s
        if report.follows is None:
            self.reported.clear()
        self.reported.update(split(report.come))
        self.reported.difference_update(split(report.gone))
        # What was sent before the previous report is in this one, or already evicted.
        self.sent = {h: after for h, after in self.sent.items() if after >= self.previous}
        return True

    def count_hits(self, hashes: Sequence[bytes]) -> int:
        """Leading blocks of the prompt that are, or are about to be, cached here."""
        for i, block_hash in enumerate(hashes):
            if block_hash not in self.reported and block_hash not in self.sent:
                return i
        return len(hashes)

    def load(self, now: float) -> float:
        """Tokens of work ahead: what was known, less what has been worked off since."""
        return max(self.load_tokens - (now - self.load_at) * self.tokens_per_s, 0.0)

    def crowding(self, now: float) -> float:
        """The share of its cache that has been filled anew of late; more than 1 if it was often."""
        recent = self.taken_in * math.exp((self.taken_in_at - now) / _CROWDED_FOR_S)
        return recent / self.num_blocks if self.num_blocks else 0.0

    def note_sent(self, hashes: Sequence[bytes], tokens: float, now: float) -> None:
        new = len(hashes) - self.count_hits(hashes)
        self.taken_in = self.crowding(now) * self.num_blocks + new
        self.taken_in_at = now
        self.sent.update(dict.fromkeys(hashes, self.sequence))
        self.load_tokens, self.load_at = self.load(now) + tokens, now


class PrefixBalancer:
    """The state of one router. Several agree as far as reports and what they tell each other go.

    Reports come in another thread than questions.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._sent: list[Sent] = []
        self._clock = clock
        self._lock = threading.Lock()

    def keep(self, names: Iterable[str]) -> None:
        """The replicas that there are now."""
        kept = set(names)
        with self._lock:
            for name in self._replicas.keys() - kept:
                del self._replicas[name]
            for name in kept:
                self._replicas.setdefault(name, _Replica())

    def take_report(self, name: str, report: ReplicaReport) -> bool:
        """False when it goes on from one that has not come here."""
        with self._lock:
            replica = self._replicas.setdefault(name, _Replica())
            return replica.take_report(report, self._clock())

    def take_sent(self) -> list[Sent]:
        """What has been sent since the last call, for the other routers."""
        with self._lock:
            sent, self._sent = self._sent, []
        return sent

    def note_sent(self, sent: Iterable[Sent]) -> None:
        """What another router has sent."""
        with self._lock:
            for one in sent:
                if replica := self._replicas.get(one.replica):
                    replica.note_sent(split(one.hashes), one.tokens, self._clock())

    def choose(self, prompt: RoutedPrompt = _UNKNOWN, session: str = "") -> str:
        """The replica for a prompt; raises LookupError when there is none.

        Requests of one `session` stay together while that costs little.
        """
        with self._lock:
            if not self._replicas:
                raise LookupError("there is no replica")
            now = self._clock()
            uncached, costs = self._costs(prompt, now)
            # Equal costs go to the same replica for the same prompt, and spread over all prompts.
            salt = session or (prompt.hashes[0].hex() if prompt.hashes else "")
            chosen = min(costs, key=lambda name: (costs[name], _rank(salt, name)))
            if session:
                home = max(costs, key=lambda name: _rank(session, name))
                limit = costs[chosen] * _SESSION_OVERLOAD + _SESSION_SLACK_TOKENS
                chosen = home if costs[home] <= limit else chosen
            tokens = uncached[chosen] + RUNNING_COST_TOKENS
            self._replicas[chosen].note_sent(prompt.hashes, tokens, now)
            self._sent.append(Sent(chosen, join(prompt.hashes), tokens))
            return chosen

    def _costs(self, prompt: RoutedPrompt, now: float) -> tuple[dict[str, float], dict[str, float]]:
        """(tokens that a replica would have to compute, and what that costs), by name."""
        crowding = {name: replica.crowding(now) for name, replica in self._replicas.items()}
        least = min(crowding.values())
        uncached, costs = {}, {}
        for name, replica in self._replicas.items():
            hits = replica.count_hits(prompt.hashes) * prompt.tokens_per_block
            uncached[name] = max(prompt.num_tokens - hits, 0)
            pushed_out = min(crowding[name] - least, 1.0) * _CROWDING_COST
            costs[name] = replica.load(now) + uncached[name] * (1 + pushed_out)
        return uncached, costs


def _rank(key: str, name: str) -> bytes:
    """Rendezvous hashing (Thaler and Ravishankar, 1998): routers agree without talking."""
    return hashlib.blake2b(f"{key}\0{name}".encode(), digest_size=8).digest()
