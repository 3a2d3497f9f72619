"""Requests wait for whatever they need, and for no more than that."""

from concurrent.futures import Future
from typing import Any

import pytest

from engine.sampling_params import SamplingParams
from engine.schedule.antechamber import Antechamber
from engine.schedule.request import Request


class Things:
    """A prerequisite of requests with this letter in their name."""

    def __init__(self, letter: str) -> None:
        self._letter = letter
        self.begun: dict[str, Future[Any]] = {}
        self.taken: list[tuple[str, Any]] = []

    def begin(self, request: Request) -> "Future[Any] | None":
        if self._letter not in request.id:
            return None
        return self.begun.setdefault(request.id, Future())

    def take(self, request: Request, thing: Any) -> object:
        self.taken.append((request.id, thing))
        return thing

    def close(self) -> None: ...


@pytest.fixture
def grammars() -> Things:
    return Things("g")


@pytest.fixture
def adapters() -> Things:
    return Things("a")


@pytest.fixture
def antechamber(grammars: Things, adapters: Things) -> Antechamber:
    return Antechamber([grammars, adapters])


def request(name: str) -> Request:
    return Request(name, [5], SamplingParams(), 0)


def released(antechamber: Antechamber) -> list[tuple[str, str | None]]:
    return [(request.id, refusal) for request, _, refusal in antechamber.release()]


def test_who_needs_nothing_does_not_wait(antechamber: Antechamber) -> None:
    assert not antechamber.enter(request("x"))
    assert not antechamber and not released(antechamber)


def test_who_needs_two_things_waits_for_both(
    antechamber: Antechamber, grammars: Things, adapters: Things
) -> None:
    assert antechamber.enter(request("ga"))
    grammars.begun["ga"].set_result("grammar")
    assert not released(antechamber) and not grammars.taken
    adapters.begun["ga"].set_result("adapter")
    ((ready, held, refusal),) = antechamber.release()
    assert (ready.id, held, refusal) == ("ga", ("grammar", "adapter"), None)
    assert grammars.taken == [("ga", "grammar")] and adapters.taken == [("ga", "adapter")]
    assert not antechamber


def test_nobody_waits_for_what_another_needs(
    antechamber: Antechamber, grammars: Things, adapters: Things
) -> None:
    for name in ("g", "a", "ga"):
        antechamber.enter(request(name))
    adapters.begun["a"].set_result(None)
    assert released(antechamber) == [("a", None)]
    assert "g" in antechamber and "ga" in antechamber


def test_who_cannot_have_one_thing_gets_none_of_the_others(
    antechamber: Antechamber, grammars: Things, adapters: Things
) -> None:
    antechamber.enter(request("ga"))
    grammars.begun["ga"].set_exception(ValueError("no such grammar"))
    adapters.begun["ga"].set_result("adapter")
    assert released(antechamber) == [("ga", "no such grammar")]
    assert not adapters.taken


def test_who_leaves_is_forgotten_and_takes_nothing(
    antechamber: Antechamber, grammars: Things
) -> None:
    antechamber.enter(request("g"))
    antechamber.leave("g")
    antechamber.leave("never seen")
    grammars.begun["g"].set_result("grammar")
    assert not released(antechamber) and not grammars.taken
