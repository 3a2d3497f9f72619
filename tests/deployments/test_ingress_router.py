"""What an ingress router reads of the bodies that it sees, and what it hands on."""

import asyncio
import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import Request

from deployments import ray_private
from deployments.api.keys import KeyRing
from deployments.api.requests.handed_tokens import HEADER, MAX_HEADER_BYTES, HandedTokens, TokenSeal
from deployments.args import AppArgs
from deployments.routing import prompt_reader
from deployments.routing.prompt_reader import PromptReader, ReadBody
from engine.checkpoint.source import resolve
from engine.text.tokenizer import Tokenizer
from tests.deployments.local_server import LocalServer
from tests.deployments.scripted import ScriptedApi

KEYS = KeyRing(["acme:sk-acme"])
ARGS = AppArgs()
TOKENIZER = Tokenizer(resolve(ARGS.model))
LONG = "Repeat these words: apple river stone. " * 24
CHAT = {"messages": [{"role": "system", "content": LONG}, {"role": "user", "content": LONG}]}
RESPONSE = {"instructions": LONG, "input": LONG}
MESSAGES = {"max_tokens": 1, "system": LONG, "messages": CHAT["messages"][1:]}
PATHS = {"messages": "/v1/chat/completions", "input": "/v1/responses", "prompt": "/v1/completions"}


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is busy with other tests is slow to read."""
    monkeypatch.setattr(prompt_reader, "_READ_S", 30)
    monkeypatch.setattr(prompt_reader, "_PATIENCE_S", 30)


def path_of(body: dict[str, Any]) -> str:
    if "system" in body:
        return "/v1/messages"
    (path,) = (path for field, path in PATHS.items() if field in body)
    return path


def reader(keys: KeyRing | None = None, room: int = 2**19) -> PromptReader:
    return PromptReader(ARGS, TOKENIZER, keys, room)


def question(body: bytes, **headers: str) -> Request:
    """From HAProxy, in two pieces."""
    pieces = [body[:1], body[1:]]

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": named}, receive)


def read(body: dict[str, Any], size: int | None = None, **options: Any) -> ReadBody | None:
    """
    Args:
        size: of HAProxy's buffer.
    """
    content = json.dumps(body, ensure_ascii=False).encode()
    cut = {} if size is None else {"x_body_truncated": f"{size}/{len(content)}"}
    return asyncio.run(reader(**options).read(question(content[:size], **cut)))


@pytest.mark.parametrize(
    ("keys", "headers", "is_read"),
    [
        (KEYS, {"authorization": "Bearer sk-acme"}, True),
        (KEYS, {"authorization": "Bearer sk-other"}, False),
        (KEYS, {"x_api_key": "sk-acme"}, True),
        (KEYS, {}, True),  # its key may be in a header that HAProxy does not show
        (KeyRing([]), {}, True),
        (None, {}, True),
    ],
    ids=["ours", "not-ours", "anthropic", "none", "no-keys", "keys-not-shown"],
)
def test_with_a_wrong_key_nothing_is_read(
    keys: KeyRing | None, headers: dict[str, str], is_read: bool
) -> None:
    content = json.dumps(CHAT).encode()
    found = asyncio.run(reader(keys).read(question(content, **headers)))
    assert (found is not None) == is_read


@pytest.mark.parametrize(
    "body",
    [
        CHAT,
        MESSAGES,
        RESPONSE,
        {"input": CHAT["messages"]},
        {"prompt": LONG},
        {"prompt": [5, 6, 7] * 50},
    ],
    ids=["chat", "messages", "response", "response-items", "text", "tokens"],
)
def test_prompts_are_those_that_the_api_serves(body: dict[str, Any], demo: LocalServer) -> None:
    found = read(body)
    path = path_of(body)
    limit = "max_output_tokens" if "input" in body else "max_tokens"
    usage = httpx.post(f"{demo.url}{path}", json=body | {limit: 1}).json()["usage"]
    num_tokens = usage.get("prompt_tokens") or usage["input_tokens"]
    num_tokens += usage.get("cache_read_input_tokens", 0)  # which Anthropic counts apart
    assert found is not None and found.prompt.num_tokens == num_tokens
    assert len(found.prompt.hashes) == num_tokens // ARGS.block_size > 3


@pytest.mark.parametrize(
    "body",
    [
        CHAT,
        {"model": "manta-demo", **CHAT},
        MESSAGES,
        {"messages": CHAT["messages"] * 4},
        RESPONSE,
        {"input": CHAT["messages"]},
        {"prompt": LONG * 3},
        {"prompt": "ä🦈" * 1000},
    ],
    ids=["chat", "model-first", "anthropic", "messages", "response", "items", "text", "characters"],
)
def test_what_is_cut_is_routed_by_its_beginning(body: dict[str, Any]) -> None:
    whole = read(body)
    assert whole is not None
    full_size = len(json.dumps(body, ensure_ascii=False).encode())
    for size in range(full_size * 5 // 8, full_size, full_size // 37):
        found = read(body, size)
        assert found is not None
        hashes = list(found.prompt.hashes)
        while hashes and hashes[-1] not in whole.prompt.hashes:
            hashes.pop()  # which the cut went through, or the template's end
        assert hashes == whole.prompt.hashes[: len(hashes)]
        # Of half of the text, the blocks of nearly half of it.
        assert len(hashes) >= len(whole.prompt.hashes) * 0.4
        assert found.prompt.num_tokens == pytest.approx(whole.prompt.num_tokens, rel=0.25)
        # Who has all blocks that are known spares all of it, but for less than a block's part.
        spared = len(found.prompt.hashes) * found.prompt.tokens_per_block
        assert -1 < found.prompt.num_tokens - spared <= found.prompt.tokens_per_block + 1
        assert not found.headers


@pytest.mark.parametrize(
    "body",
    [
        {"tempo": 1},
        {"prompt": [10**30]},
        {"messages": []},
        {"input": "on", "previous_response_id": "resp_1"},
        {},
    ],
)
def test_what_has_no_prompt_is_routed_by_load(body: dict[str, Any]) -> None:
    assert read(body) is None


def test_a_prompt_that_ends_before_the_cut_is_no_longer_than_it_is() -> None:
    """What follows it in the body are settings, or nothing."""
    whole = read(CHAT)
    assert whole is not None
    for rest in ({"user": "x" * 99_999}, {"max_tokens": 1, "metadata": {"text": "x" * 99_999}}):
        found = read(CHAT | rest, size=2**14)
        assert found is not None
        assert found.prompt == whole.prompt


def test_two_are_read_at_a_time_and_nobody_waits_long_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_go_on, num_reading = threading.Event(), threading.Semaphore(0)
    really: Callable[..., Any] = TOKENIZER.encode

    def encode(*args: Any, **options: Any) -> list[int]:
        num_reading.release()
        assert may_go_on.wait(30)
        return really(*args, **options)

    async def run() -> None:
        content, own = b'{"prompt": "hi"}', reader()
        busy = [asyncio.create_task(own.read(question(content))) for _ in range(2)]
        for _ in busy:
            assert await asyncio.to_thread(num_reading.acquire, timeout=30)
        assert await own.read(question(content)) is None
        may_go_on.set()
        assert all(await asyncio.gather(*busy))
        assert await own.read(question(content)) is not None

    monkeypatch.setattr(TOKENIZER, "encode", encode)
    monkeypatch.setattr(prompt_reader, "_PATIENCE_S", 0.01)
    asyncio.run(asyncio.wait_for(run(), 30))


def test_nobody_waits_for_long_prompts_but_those_who_send_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    may_go_on = threading.Event()
    really: Callable[..., Any] = TOKENIZER.encode

    def encode(text: str, *args: Any, **options: Any) -> list[int]:
        assert len(text) < 99 or may_go_on.wait(30)
        return really(text, *args, **options)

    async def run() -> None:
        short, long, own = b'{"prompt": "hi"}', json.dumps({"prompt": "hi " * 30_000}), reader()
        waiting = [asyncio.create_task(own.read(question(long.encode()))) for _ in range(8)]
        assert await own.read(question(short)) is not None
        assert not any(task.done() for task in waiting)
        may_go_on.set()
        assert all(await asyncio.gather(*waiting))

    monkeypatch.setattr(TOKENIZER, "encode", encode)
    asyncio.run(asyncio.wait_for(run(), 30))


def test_what_takes_too_long_to_read_is_routed_by_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the time that HAProxy has; who reads it is not free for another until it has ended."""
    may_go_on = threading.Event()
    really: Callable[..., Any] = TOKENIZER.encode

    def encode(*args: Any, **options: Any) -> list[int]:
        assert may_go_on.wait(30)
        return really(*args, **options)

    async def run() -> None:
        content, own = b'{"prompt": "hi"}', reader()
        for _ in range(3):
            assert await own.read(question(content)) is None
        assert num_read == 2
        may_go_on.set()
        while await own.read(question(content)) is None:
            await asyncio.sleep(0.01)

    num_read = 0
    read_one = PromptReader._read

    def count(*arguments: Any) -> ReadBody | None:
        nonlocal num_read
        num_read += 1
        return read_one(*arguments)

    monkeypatch.setattr(TOKENIZER, "encode", encode)
    monkeypatch.setattr(PromptReader, "_read", count)
    monkeypatch.setattr(prompt_reader, "_READ_S", 0.05)
    monkeypatch.setattr(prompt_reader, "_PATIENCE_S", 0.01)
    asyncio.run(asyncio.wait_for(run(), 30))


def test_who_comes_while_others_are_read_is_read_after_them() -> None:
    async def run() -> None:
        content, own = b'{"prompt": "hi"}', reader()
        assert all(await asyncio.gather(*(own.read(question(content)) for _ in range(8))))

    asyncio.run(run())


def test_handed_tokens_are_believed_of_one_body_from_who_has_the_secret() -> None:
    seal, handed = TokenSeal(b"secret"), HandedTokens("Chat", [0, 1, 258, 151_643, 2**24 - 1])
    value = seal.seal(b"body", handed)
    assert value is not None and seal.open(b"body", value) == handed
    assert seal.open(b"other", value) is None
    assert TokenSeal(b"other").open(b"body", value) is None
    assert seal.open(b"body", value.replace("Chat", "Response")) is None
    for forged in ("", "Chat", "Chat !", "Chat AAAA", value[:-4], None):
        assert seal.open(b"body", forged) is None
    assert seal.seal(b"", HandedTokens("Chat", [2**24])) is None
    assert seal.seal(b"", HandedTokens("Chat", [1] * MAX_HEADER_BYTES)) is None


def test_headers_are_added_only_where_haproxy_has_room() -> None:
    whole = read(CHAT)
    assert whole is not None
    size = len(json.dumps(CHAT).encode()) + len(whole.headers[HEADER])
    for room, is_handed_on in ((size, True), (size - 1, False)):
        found = read(CHAT, room=room)
        assert found is not None and bool(found.headers) == is_handed_on


@pytest.mark.parametrize(
    "body",
    [CHAT, MESSAGES, RESPONSE, {"prompt": LONG}],
    ids=["chat", "messages", "response", "text"],
)
def test_a_prompt_is_tokenized_once(
    body: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the router; the API takes no other text for it, though, and no other kind of request."""
    api = ScriptedApi(tmp_path, [])
    api.says = "hello"
    tokenizer = api.front.tokenizer
    own = PromptReader(api.args, tokenizer, None, 2**19)
    content = json.dumps(body).encode()
    found = asyncio.run(own.read(question(content)))
    assert found is not None
    texts: list[str] = []
    really = tokenizer.encode

    def encode(text: str, *args: Any, **options: Any) -> list[int]:
        texts.append(text)
        return really(text, *args, **options)

    monkeypatch.setattr(tokenizer, "encode", encode)
    path = path_of(body)

    def num_times(sent: bytes) -> int:
        """How often the long text, or a part of it, is tokenized."""
        texts.clear()
        headers = found.headers | {"content-type": "application/json"}
        answer = asyncio.run(api.http.post(path, content=sent, headers=headers))
        assert answer.status_code == 200, answer.text
        return sum(LONG[:50] in text for text in texts)

    assert num_times(content) == 0
    assert num_times(content + b" ") > 0


def test_routers_see_keys_where_haproxy_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not ray_private.routers_see_keys()
    monkeypatch.setattr("ray.serve._private.constants.SERVE_SESSION_ID", "Authorization")
    assert ray_private.routers_see_keys()


def test_this_ray_has_all_that_routing_needs_and_another_is_told_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    constants = "ray.serve._private.constants"
    assert ray_private.missing_names() == []
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    monkeypatch.setattr(f"{constants}.RAY_SERVE_ENABLE_HA_PROXY", True)
    monkeypatch.setattr(f"{constants}.RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY", False)
    with caplog.at_level("WARNING", "ray.serve"):
        assert not ray_private.can_route_by_body()
    assert "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY=1" in caplog.text
    monkeypatch.setattr(f"{constants}.RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY", True)
    assert ray_private.can_route_by_body()
    monkeypatch.delattr("ray.serve._private.common.ReplicaID.to_full_id_str")
    with caplog.at_level("WARNING", "ray.serve"):
        assert not ray_private.can_route_by_body()
    assert "lacks ray.serve._private.common:ReplicaID.to_full_id_str" in caplog.text
