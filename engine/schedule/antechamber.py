"""Where requests wait for what they need before they can be scheduled: a compiled grammar, say."""

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from engine.schedule.request import Request


class Prerequisite(Protocol):
    """One kind of thing that some requests need, made beside the engine's thread."""

    def begin(self, request: Request) -> "Future[Any] | None":
        """Start making it; None for a request that needs none.

        The future's exception is why the request cannot have it. Nobody cancels the future, for
        others may wait for the same thing.
        """

    def take(self, request: Request, thing: Any) -> object:
        """The request has all that it needs, this too, and is about to be queued.

        What is returned is kept alive as long as the request.
        """

    def close(self) -> None:
        """Stop what runs beside the engine's thread."""


@dataclass(frozen=True)
class _Needs:
    request: Request
    things: "list[tuple[Prerequisite, Future[Any]]]"

    @property
    def are_met(self) -> bool:
        return all(thing.done() for _, thing in self.things)

    def refusal(self) -> str | None:
        """Why it cannot be served, once all has been tried."""
        errors = [error for _, thing in self.things if (error := thing.exception()) is not None]
        return str(errors[0]) if errors else None


class Antechamber:
    """Requests that still need something, in the order in which they came."""

    def __init__(self, prerequisites: Sequence[Prerequisite]) -> None:
        self._prerequisites = prerequisites
        self._waiting: dict[str, _Needs] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def enter(self, request: Request) -> bool:
        """Whether the request has to wait; one that needs nothing does not enter."""
        begun = [(kind, kind.begin(request)) for kind in self._prerequisites]
        things = [(kind, thing) for kind, thing in begun if thing is not None]
        if things:
            self._waiting[request.id] = _Needs(request, things)
        return bool(things)

    def leave(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        self._waiting.pop(request_id, None)

    def wait(self, timeout_s: float) -> None:
        """Return when something that is waited for is there, or after so long."""
        things = [thing for needs in self._waiting.values() for _, thing in needs.things]
        wait([thing for thing in things if not thing.done()], timeout_s, FIRST_COMPLETED)

    def release(self) -> list[tuple[Request, tuple[object, ...], str | None]]:
        """The requests that have all they need, with that, or never will: then with the reason."""
        released: list[tuple[Request, tuple[object, ...], str | None]] = []
        for needs in [needs for needs in self._waiting.values() if needs.are_met]:
            del self._waiting[needs.request.id]
            refusal = needs.refusal()
            things = needs.things if refusal is None else []
            held = tuple(kind.take(needs.request, thing.result()) for kind, thing in things)
            released.append((needs.request, held, refusal))
        return released

    def close(self) -> None:
        for kind in self._prerequisites:
            kind.close()
