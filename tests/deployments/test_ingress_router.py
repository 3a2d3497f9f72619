"""Which prompts an ingress router reads before it has chosen a replica."""

import asyncio
import threading

import pytest
from fastapi import Request

from deployments import ray_private
from deployments.api.keys import KeyRing
from deployments.routing.balancer import RoutedPrompt
from deployments.routing.ingress_router import PromptReader

PROMPT = RoutedPrompt([b"hash"], 1, 1)
KEYS = KeyRing(["acme:sk-acme"])


class Reading:
    """Notes what is read; goes on when it may."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def __call__(self, body: bytes) -> RoutedPrompt | None:
        self.bodies.append(body)
        assert self.may_go_on.wait(30)
        return PROMPT


def question(body: bytes = b"{}", **headers: str) -> Request:
    """From HAProxy, in two pieces."""
    pieces = [body[:1], body[1:]]

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": named}, receive)


@pytest.mark.parametrize(
    ("keys", "headers", "is_read"),
    [
        (KEYS, {"authorization": "Bearer sk-acme"}, True),
        (KEYS, {"authorization": "Bearer sk-other"}, False),
        (KEYS, {}, False),
        (KeyRing([]), {}, True),
        (None, {}, True),
    ],
    ids=["ours", "not-ours", "none", "no-keys", "keys-not-shown"],
)
def test_without_a_key_nothing_is_read(
    keys: KeyRing | None, headers: dict[str, str], is_read: bool
) -> None:
    reading = Reading()
    prompt = asyncio.run(PromptReader(reading, keys).prompt(question(**headers)))
    assert prompt == (PROMPT if is_read else None)
    assert reading.bodies == ([b"{}"] if is_read else [])


@pytest.mark.parametrize(
    "request_",
    [question(b"x" * (2**20 + 1)), question(b"{}", x_body_truncated="2/9")],
    ids=["large", "truncated"],
)
def test_what_would_take_long_or_is_cut_is_not_read(request_: Request) -> None:
    reading = Reading()
    assert asyncio.run(PromptReader(reading, None).prompt(request_)) is None
    assert reading.bodies == []


def test_two_are_read_at_a_time_and_nobody_waits_for_them() -> None:
    async def run() -> None:
        reading = Reading()
        reader = PromptReader(reading, None)
        reading.may_go_on.clear()
        busy = [asyncio.create_task(reader.prompt(question())) for _ in range(2)]
        while len(reading.bodies) < 2:
            await asyncio.sleep(0.001)
        assert await reader.prompt(question()) is None
        reading.may_go_on.set()
        assert await asyncio.gather(*busy) == [PROMPT, PROMPT]
        assert await reader.prompt(question()) == PROMPT

    asyncio.run(asyncio.wait_for(run(), 30))


def test_routers_see_keys_where_haproxy_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ray_private.routers_see_keys()
    monkeypatch.setattr("ray.serve._private.constants.SERVE_SESSION_ID", "Authorization")
    assert ray_private.routers_see_keys()
