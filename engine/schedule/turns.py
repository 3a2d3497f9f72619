"""In which turn a request is served where many ask at once: start-time fair queueing.

Requests belong to flows, such as those of one client. A flow's waiting requests take one turn after
another, and a request of a flow that has none waiting takes the turn that comes next: so it waits
for one request of every other flow, however many those have queued. Where every request is a flow
of its own, and where all are of one flow, turns are in order of arrival. (After Goyal, Vin and
Cheng, 1996, with a clock that new flows move on too, so that they starve nobody.)
"""

from collections import Counter

from engine.schedule.sequence import Sequence


class Turns:
    """Hands out turns, the smallest first, and knows which is being served."""

    counts_tokens = False  # whether `charge` makes a difference

    def __init__(self) -> None:
        self._now = 0
        self._last: dict[str, int] = {}  # turns of the flows that have requests waiting
        self._num_waiting: Counter[str] = Counter()

    def take(self, flow: str) -> int:
        """The turn of a request that comes now."""
        turn = max(self._now, self._last.get(flow, 0)) + 1
        if flow not in self._last:
            self._now = turn
        self._last[flow] = turn
        return turn

    def wait(self, flow: str) -> None:
        """One of its requests waits, for the first time or again."""
        self._num_waiting[flow] += 1

    def leave(self, flow: str, turn: int = 0) -> None:
        """One of its requests waits no more: it is served in its `turn`, or gone."""
        self._now = max(self._now, turn)
        self._num_waiting[flow] -= 1
        if self._num_waiting[flow] == 0:
            del self._num_waiting[flow]
            self._last.pop(flow, None)

    def first(self, waiting: list[Sequence]) -> Sequence:
        """Who of those who wait, in the policy's order, is to be admitted next."""
        return waiting[0]

    def charge(self, sequence: Sequence, num_prompt: int = 0, num_output: int = 0) -> None:
        """A sequence has been served so many tokens; turns are not taken by tokens here."""

    def victim(self, first: Sequence, running: list[Sequence]) -> Sequence | None:
        """Who is to give up its row for the first of those who wait, if anybody is."""
        return None
