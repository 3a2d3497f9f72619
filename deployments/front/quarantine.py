"""Who goes to an engine when, so that a request that kills engines is found and ends alone.

An engine that dies may have died of any request that it had brought no token, and the next one,
which is handed all of them, would die of it again. So these go there one at a time, each once
nobody else is in doubt, until a token shows that nothing was wrong with it. Those that come
meanwhile wait behind them; whoever has had a token notices nothing.
"""

from collections.abc import Iterable
from itertools import takewhile

# In a row, before a request has had a token. Where engines are killed from outside again and again,
# two may be chance.
MAX_DEATHS = 3


class Quarantine:
    """Knows requests by their ids."""

    def __init__(self) -> None:
        self._waiting: dict[str, None] = {}  # for their turn, in its order
        self._on_trial: set[str] = set()  # with the engine, which has brought them no token yet
        self._deaths: dict[str, int] = {}  # of engines in a row that had brought it none

    def restart(self, request_ids: Iterable[str]) -> None:
        """There is a new engine, and it is to have all of these."""
        # First those above suspicion, then those most in doubt.
        order = sorted(request_ids, key=lambda i: (i in self._deaths, -self._deaths.get(i, 0)))
        self._waiting = dict.fromkeys(order)
        self._on_trial.clear()

    def add(self, request_id: str) -> None:
        self._waiting[request_id] = None

    def take(self) -> list[str]:
        """Whose turn it is now: everybody before the first suspect, or that one alone."""
        if self._deaths and not self._deaths.keys().isdisjoint(self._on_trial):
            return []
        taken = list(takewhile(lambda i: i not in self._deaths, self._waiting))
        if not taken and not self._on_trial:
            taken = list(self._waiting)[:1]
        for request_id in taken:
            del self._waiting[request_id]
        self._on_trial.update(taken)
        return taken

    def acquit(self, request_id: str) -> None:
        """The engine has brought it a token."""
        if request_id in self._on_trial:
            self._on_trial.remove(request_id)
            self._deaths.pop(request_id, None)

    def remove(self, request_id: str) -> None:
        """It has ended."""
        self._waiting.pop(request_id, None)
        self._on_trial.discard(request_id)
        self._deaths.pop(request_id, None)

    def blame(self) -> str | None:
        """The engine has died; returns whom it died of, as far as can be told.

        That is who alone was in doubt, and not for the first time.
        """
        for request_id in self._on_trial:
            self._deaths[request_id] = self._deaths.get(request_id, 0) + 1
        suspects, self._on_trial = self._on_trial, set()
        if len(suspects) != 1:
            return None
        (suspect,) = suspects
        return suspect if self._deaths[suspect] > 1 else None

    def is_guilty(self, request_id: str) -> bool:
        return self._deaths.get(request_id, 0) >= MAX_DEATHS
