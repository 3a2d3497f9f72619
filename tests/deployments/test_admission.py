"""Who is let in: keys, sizes, a full queue and who gets how much of it, priorities, and how long a
request may take."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import PlainTextResponse

from deployments.api.gate import Gate
from deployments.api.keys import ApiKeysError, KeyRing
from deployments.api.request_log import LOGGER
from deployments.api.routes import engine_events
from deployments.api.scope import scope
from deployments.args import AppArgs, ServiceArgs
from deployments.cached_blocks import short, split
from deployments.front.places import Places
from deployments.front.quotas import Quota
from deployments.observe.metrics import Metrics
from engine.schedule.block_pool import BlockHasher
from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer, serve_locally

ASK: list[Any] = [{"role": "user", "content": "Repeat these words: apple river stone"}]
LONG = {"ignore_eos": True}  # with max_tokens: goes on until it is told to stop


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """With keys of two names, whose prefixes are apart, and small limits."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("# who may ask\nacme:sk-acme\nacme:sk-acme-next\nglobex:sk-globex\n")
    with serve_locally(
        api_keys_file=str(keys),
        max_request_bytes=10_000,
        max_messages=3,
        num_blocks=128,
        max_model_len=1024,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def narrow() -> Iterator[LocalServer]:
    """One request at a time, two in the queue; by priority."""
    with serve_locally(
        max_num_seqs=1,
        max_queued_requests=2,
        max_queued_tokens=100,
        scheduling_policy="priority",
        num_blocks=128,
        max_model_len=1024,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    """One request at a time, eight in the queue, two names."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text("acme:sk-acme\nglobex:sk-globex\n")
    with serve_locally(
        api_keys_file=str(keys),
        max_num_seqs=1,
        max_queued_requests=8,
        num_blocks=128,
        max_model_len=1024,
    ) as server:
        yield server


# Keys


def test_only_our_keys_are_let_in(guarded: LocalServer) -> None:
    for key in ("sk-acme", "sk-acme-next", "sk-globex"):
        with guarded.client(api_key=key) as client:
            answer = client.chat.completions.create(model="manta-demo", messages=ASK, temperature=0)
            assert answer.choices[0].message.content == "apple river stone"
    for key in ("sk-acme-", "acme", "acme:sk-acme"):
        with guarded.client(api_key=key) as client, pytest.raises(openai.AuthenticationError) as e:
            client.models.list()
        assert e.value.code == "invalid_api_key" and key not in e.value.message


@pytest.mark.parametrize("header", [{}, {"Authorization": "Basic sk-acme"}])
def test_without_a_key_only_what_runs_no_model(
    guarded: LocalServer, header: dict[str, str]
) -> None:
    assert httpx.get(f"{guarded.url}/health", headers=header).status_code == 200
    refused = httpx.get(f"{guarded.url}/v1/models", headers=header)
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["type"] == "authentication_error"
    body = {"messages": ASK}
    post = httpx.post(f"{guarded.url}/v1/chat/completions", json=body, headers=header)
    assert post.status_code == 401


def test_the_document_says_where_a_key_is_needed(guarded: LocalServer) -> None:
    document = httpx.get(f"{guarded.url}/openapi.json").json()
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    assert document["paths"]["/v1/models"]["get"]["security"] == [{"bearer": []}]
    assert "security" not in document["paths"]["/health"]["get"]


def test_keys_from_the_environment_and_file_are_one_ring(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text("globex:sk-2\n")
    monkeypatch.setenv("MANTA_API_KEYS", "sk-1, acme:sk-3")
    ring = KeyRing.load(ServiceArgs(api_keys_file=str(tmp_path / "keys")))
    given = [
        ring.find({"authorization": f"Bearer {key}"})
        for key in ("sk-1", "sk-2", "sk-3", "sk-4", "")
    ]
    assert given == ["key-1", "globex", "acme", None, None]
    assert ring.find({}) is None
    assert not any(key in repr(vars(ring)) for key in ("sk-1", "sk-2", "sk-3"))


def test_keys_are_replaced_in_their_file_while_the_server_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("deployments.api.keys._LOOK_S", 0)
    file = tmp_path / "keys"

    def replace(content: str) -> None:
        (tmp_path / "new").write_text(content)
        (tmp_path / "new").rename(file)

    def names(*keys: str) -> list[str | None]:
        return [ring.find({"authorization": f"Bearer {key}"}) for key in keys]

    replace("acme:old weight=2\n")
    ring = KeyRing.load(ServiceArgs(api_keys_file=str(file)))
    replace("acme:old\nacme:new\nglobex:other\n")
    assert names("old", "new", "other") == ["acme", "acme", "globex"]
    assert ring.has_several_names and ring.quota("acme") == Quota()
    replace("acme:new\n")
    assert names("old", "new", "other") == [None, "acme", None]
    for unreadable in ("", "acme:", "acme:newer wieght=2"):  # then nothing changes
        replace(unreadable)
        assert names("newer", "new", "") == [None, "acme", None]
    file.unlink()
    assert names("new", "") == ["acme", None]


def test_without_a_keys_file_none_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_API_KEYS", "acme:sk-1")
    ring = KeyRing.load(ServiceArgs())
    looked_for: list[Any] = []
    monkeypatch.setattr("deployments.api.keys._LOOK_S", 0)
    monkeypatch.setattr("deployments.api.keys._stamp", looked_for.append)
    assert ring.find({"authorization": "Bearer sk-1"}) == "acme"
    assert not looked_for


@pytest.mark.parametrize(
    ("args", "fault"),
    [
        ({"require_api_key": True}, "MANTA_API_KEYS must be set"),
        ({"isolate_cache_by_key": True}, "isolate_cache_by_key: there are no API keys"),
        ({"api_keys_file": "/nowhere"}, "/nowhere: No such file"),
    ],
)
def test_keys_that_must_be_there_and_are_not(args: dict[str, Any], fault: str) -> None:
    with pytest.raises(ApiKeysError, match=fault):
        KeyRing.load(ServiceArgs(**args))


@pytest.mark.parametrize("entry", ["acme:", ":sk", "\udcff:sk"])
def test_an_entry_without_a_key_or_a_name(monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    monkeypatch.setenv("MANTA_API_KEYS", f"good,{entry}")
    with pytest.raises(ApiKeysError, match=r"API key 2: should be KEY or NAME:KEY"):
        KeyRing.load(ServiceArgs())


def test_tenants_do_not_share_prefixes(guarded: LocalServer) -> None:
    """Two keys of one name do, and a salt divides further."""
    words = " ".join(["mirror"] * 60)

    def cached(key: str, salt: str = "") -> int:
        with guarded.client(api_key=key) as client:
            answer = client.completions.create(
                model="manta-demo", prompt=words, max_tokens=1, extra_body={"cache_salt": salt}
            )
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    assert cached("sk-acme") == 0
    assert cached("sk-acme-next") > 0
    assert cached("sk-globex") == 0
    assert cached("sk-globex", salt="own") == 0
    assert cached("sk-globex", salt="own") > 0


def test_replicas_report_a_tenants_blocks_as_routers_name_them(guarded: LocalServer) -> None:
    prompt = list(range(100, 164))
    with guarded.client(api_key="sk-acme") as client:
        client.completions.create(model="manta-demo", prompt=prompt, max_tokens=1)
    names: list[bytes] = []
    BlockHasher(32, guarded.engine.config.block_key).extend(names, prompt)
    reported = split(guarded.front.client.cached_blocks.names())
    assert len(names) == 2 and all(short(name) in reported for name in names)


@pytest.mark.parametrize(
    ("keys", "isolate", "owner"),
    [
        ([], None, ""),
        (["acme:one"], None, ""),
        (["acme:one", "acme:two"], None, ""),
        (["acme:one", "globex:two"], None, "acme"),
        (["one", "two"], None, "key-1"),
        (["acme:one", "globex:two"], False, ""),
        (["acme:one"], True, "acme"),
    ],
)
def test_keys_of_several_names_have_prefixes_of_their_own_by_default(
    keys: list[str], isolate: bool | None, owner: str
) -> None:
    async def app(*asgi: Any) -> None:
        await PlainTextResponse(scope().cache_owner)(*asgi)

    client = SimpleNamespace(metrics=Metrics(AppArgs(), dict))
    front: Any = SimpleNamespace(
        model_name="m", client=client, num_open=0, check_open=lambda: None, block_key=b"key"
    )
    args = ServiceArgs(isolate_cache_by_key=isolate, request_log="off")
    gate = Gate(app, front, args, KeyRing(keys))
    http = httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://test")
    answer = http.get("/v1/models", headers={"Authorization": "Bearer one"})
    assert asyncio.run(answer).text == owner


def test_the_log_names_the_key_and_says_neither_it_nor_the_prompt(
    guarded: LocalServer, caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger(LOGGER)
    log.addHandler(caplog.handler)
    try:
        with guarded.client(api_key="sk-globex") as client:
            answer = client.chat.completions.with_raw_response.create(
                model="manta-demo",
                messages=ASK,
                temperature=0,
                extra_headers={"x-request-id": "trace-me"},
            )
        assert answer.headers["x-request-id"] == "trace-me"
        wait_until(lambda: len(caplog.messages) > 0)
    finally:
        log.removeHandler(caplog.handler)
    line = json.loads(caplog.messages[0])
    assert line["request_id"] == "trace-me" and line["key"] == "globex"
    assert line["status"] == 200 and line["finish_reasons"] == ["stop"]
    assert line["output_tokens"] > 3 and 0 < line["ttft_ms"] <= line["duration_ms"]
    assert "sk-globex" not in caplog.text and "apple" not in caplog.text


# Sizes


def test_a_body_that_is_too_large(guarded: LocalServer) -> None:
    with guarded.client(api_key="sk-acme") as client, pytest.raises(openai.APIStatusError) as e:
        client.completions.create(model="manta-demo", prompt="a" * 10_001)
    assert e.value.status_code == 413 and e.value.code == "request_too_large"


def test_a_body_that_does_not_say_how_large_it_is(guarded: LocalServer) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(200):
            yield b"[" * 100

    answer = httpx.post(
        f"{guarded.url}/v1/completions",
        content=endless(),
        headers={"Authorization": "Bearer sk-acme"},
    )
    assert answer.status_code == 413
    assert "10000 bytes" in answer.json()["error"]["message"]


def test_headers_that_are_too_large(guarded: LocalServer) -> None:
    """Whoever sends them: they are looked at before the key."""
    answer = httpx.get(f"{guarded.url}/health", headers={"x-filler": "x" * 65_000})
    assert answer.status_code == 200
    answer = httpx.get(f"{guarded.url}/health", headers={"x-filler": "x" * 70_000})
    assert answer.status_code == 431
    assert "at most 65536" in answer.json()["error"]["message"]


async def _begin(server: LocalServer, key: str, length: int) -> asyncio.StreamWriter:
    """A request whose body lacks its last byte."""
    host, port = server.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    writer.write(head.encode() + b"x" * (length - 1))
    await writer.drain()
    return writer


def test_a_body_that_does_not_come_to_its_end(
    guarded: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deployments.api.requests.body_reader._BODY_S", 0.2)

    def half() -> Iterator[bytes]:
        yield b"{"
        time.sleep(5)
        yield b"}"

    answer = httpx.post(
        f"{guarded.url}/v1/completions",
        content=half(),
        headers={"Authorization": "Bearer sk-acme", "content-type": "application/json"},
    )
    assert answer.status_code == 408
    assert answer.json()["error"]["code"] == "request_timeout"


def test_bodies_in_memory_are_limited_and_no_key_gets_all_of_it(guarded: LocalServer) -> None:
    """Room for 16 of the largest; one key may have half of it while others have none."""

    async def run() -> None:
        async with httpx.AsyncClient(base_url=guarded.url) as http:

            async def ask(key: str) -> httpx.Response:
                headers = {"Authorization": f"Bearer {key}", "content-type": "application/json"}
                return await http.post("/v1/completions", content=b"x" * 10_000, headers=headers)

            bodies = [await _begin(guarded, "sk-acme", 10_000) for _ in range(8)]
            while (answer := await ask("sk-acme")).status_code != 429:
                assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "queue_full"
            assert answer.headers["retry-after"] == "1"
            assert (await ask("sk-globex")).status_code == 400
            for writer in bodies:
                writer.close()
            while (await ask("sk-acme")).status_code == 429:
                await asyncio.sleep(0.01)

    _run(run())


def test_too_many_messages(guarded: LocalServer) -> None:
    with guarded.client(api_key="sk-acme") as client, pytest.raises(openai.BadRequestError) as e:
        client.chat.completions.create(model="manta-demo", messages=ASK * 4)
    assert e.value.param == "messages" and "the limit is 3" in e.value.message


# The queue


Ask = Callable[..., "asyncio.Task[Any]"]


@asynccontextmanager
async def _busy(server: LocalServer, api_key: str = "none") -> AsyncIterator[Ask]:
    """The server's only row is taken while this lasts; then all that was asked is served."""
    async with server.async_client(api_key=api_key) as client, asyncio.TaskGroup() as asked:

        def ask(prompt: str = "a", **options: Any) -> "asyncio.Task[Any]":
            answer = client.completions.create(
                model="manta-demo", prompt=prompt, max_tokens=1, **options
            )
            return asked.create_task(answer)

        with server.slowed():
            stream = await client.completions.create(
                model="manta-demo",
                prompt="on and on",
                max_tokens=1000,
                stream=True,
                extra_body=LONG,
            )
            async for _ in stream:
                break
            yield ask
            await stream.close()


async def _until_queued(server: LocalServer, number: int) -> None:
    while server.front.client.queue.taken != number:
        await asyncio.sleep(0.005)


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 60))


def test_a_full_queue_is_429_and_the_queued_are_served(narrow: LocalServer) -> None:
    async def run() -> None:
        async with _busy(narrow) as ask, httpx.AsyncClient(base_url=narrow.url) as http:
            queued = [ask(), ask()]
            await _until_queued(narrow, 2)
            for path, body in (
                ("/v1/completions", {"prompt": "b"}),
                ("/v1/chat/completions", {"messages": ASK, "stream": True}),
            ):
                answer = await http.post(path, json=body)
                assert answer.status_code == 429
                assert answer.json()["error"]["code"] == "queue_full"
                assert answer.json()["error"]["type"] == "rate_limit_error"
                assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert [task.result().usage.completion_tokens for task in queued] == [1, 1]

    _run(run())
    wait_until(narrow.is_idle)
    assert narrow.front.client.queue.taken == 0 and narrow.front.client.queue_tokens.taken == 0


def test_a_client_that_goes_leaves_the_queue(narrow: LocalServer) -> None:
    async def run() -> None:
        async with _busy(narrow) as ask:
            gone = ask()
            await _until_queued(narrow, 1)
            gone.cancel()
            await _until_queued(narrow, 0)

    _run(run())
    assert narrow.front.client.queue_tokens.taken == 0


def test_queued_tokens_are_limited_too_but_bar_no_single_prompt(narrow: LocalServer) -> None:
    long = " ".join(["mirror"] * 200)
    assert len(narrow.front.tokenizer.encode(long)) > 100

    async def run() -> None:
        async with _busy(narrow) as ask, httpx.AsyncClient(base_url=narrow.url) as http:
            ask(long)
            await _until_queued(narrow, 1)
            answer = await http.post("/v1/completions", json={"prompt": "a few more"})
            assert answer.status_code == 429
            assert "prompt tokens are waiting" in answer.json()["error"]["message"]

    _run(run())


def test_tokens_of_a_broken_stream_count_in_the_queue_as_a_prompt_does(narrow: LocalServer) -> None:
    body = {"prompt": "a", "stream": True, "max_tokens": 300}

    async def run() -> None:
        async with _busy(narrow) as ask, httpx.AsyncClient(base_url=narrow.url) as http:
            ask()
            await _until_queued(narrow, 1)
            for num_known, status in ((200, 429), (2, 200)):
                begun = {"resume": {"seed": 1, "token_ids": [5] * num_known}}
                async with http.stream("POST", "/v1/completions", json=body | begun) as answer:
                    assert answer.status_code == status

    _run(run())
    wait_until(narrow.is_idle)
    assert narrow.front.client.queue_tokens.taken == 0


def test_more_choices_than_a_request_may_ever_have_are_no_reason_to_retry(
    narrow: LocalServer,
) -> None:
    """Also when nobody else is there: whoever comes next must find room."""
    with narrow.client() as client, pytest.raises(openai.BadRequestError, match="send fewer"):
        client.completions.create(model="manta-demo", prompt=["a"] * 2)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), max_size=30))
def test_whoever_comes_next_finds_room(wishes: list[tuple[str, int]]) -> None:
    places, limit = Places(), 64
    for owner, number in wishes:
        if places.has_room(owner, number, limit):
            places.take(owner, number)
        assert places.has_room("next", 1, limit) == (places.taken < limit)


def test_a_key_leaves_as_much_of_the_queue_as_it_takes(shared: LocalServer) -> None:
    async def run() -> None:
        async with (
            shared.async_client(api_key="sk-acme") as acme,
            shared.async_client(api_key="sk-globex") as globex,
        ):
            async with _busy(shared, "sk-acme") as ask:
                ask(["a"] * 4)
                await _until_queued(shared, 4)
                with pytest.raises(openai.RateLimitError, match="4 requests are waiting, of at mo"):
                    await acme.completions.create(model="manta-demo", prompt="a")
                other = asyncio.create_task(
                    globex.completions.create(model="manta-demo", prompt=["b"] * 2, max_tokens=1)
                )
                await _until_queued(shared, 6)
            assert len((await other).choices) == 2

    _run(run())


def test_a_key_with_much_to_do_is_no_reason_for_another_to_wait(shared: LocalServer) -> None:
    """One row, four long requests of one key, and one of another: it takes its turn."""

    async def run() -> None:
        async with (
            shared.async_client(api_key="sk-acme") as acme,
            shared.async_client(api_key="sk-globex") as globex,
        ):
            stream = await acme.completions.create(
                model="manta-demo", prompt=["a"] * 4, max_tokens=400, stream=True, extra_body=LONG
            )
            ended = 0

            async def follow() -> None:
                nonlocal ended
                async for chunk in stream:
                    ended += sum(choice.finish_reason is not None for choice in chunk.choices)

            following = asyncio.create_task(follow())
            with shared.slowed(0.005):
                await _until_queued(shared, 3)
                await globex.completions.create(model="manta-demo", prompt="b", max_tokens=1)
            assert ended <= 2
            await following
            assert ended == 4

    _run(run())
    wait_until(shared.is_idle)
    assert shared.front.client.queue.taken == 0 and shared.front.client.queue_tokens.taken == 0


def test_the_more_urgent_goes_first(narrow: LocalServer) -> None:
    served: list[int] = []

    async def run() -> None:
        async with _busy(narrow) as ask:
            for number, priority in enumerate((5, -5), start=1):
                task = ask(extra_body={"priority": priority})
                task.add_done_callback(lambda _, priority=priority: served.append(priority))
                await _until_queued(narrow, number)

    _run(run())
    assert served == [-5, 5]


def test_priority_is_refused_where_it_would_change_nothing(demo: LocalServer) -> None:
    with demo.client() as client, pytest.raises(openai.BadRequestError) as e:
        client.completions.create(model="manta-demo", prompt="a", extra_body={"priority": 1})
    assert e.value.param == "priority" and "scheduling_policy=priority" in e.value.message


# The end


def test_a_server_that_stops_lets_nobody_in_and_answers_whoever_is(
    narrow: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_events, "_LIFETIME_S", 1000)  # of a page that is open somewhere

    async def run() -> None:
        async with httpx.AsyncClient(base_url=narrow.url) as http:
            async with _busy(narrow) as ask:
                page, queued = asyncio.create_task(http.get("/engine/events")), ask()
                await _until_queued(narrow, 1)
                while narrow.front.num_open < 3:
                    await asyncio.sleep(0.005)
                drained = asyncio.create_task(narrow.front.drain())
                await asyncio.sleep(0)
                answer = await http.post("/v1/completions", json={"prompt": "b"})
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
                assert answer.json()["error"]["message"] == "the server is shutting down"
                assert (await http.get("/health")).status_code == 503
                assert (await http.get("/metrics")).status_code == 200
                assert not drained.done() and not queued.done()
            assert queued.result().usage.completion_tokens == 1
            await drained
            assert (await page).status_code == 200

    try:
        _run(run())
    finally:
        narrow.front.is_draining = False


# Time


def test_a_request_that_takes_too_long(demo: LocalServer) -> None:
    body = {"timeout": 0.05, **LONG}
    with demo.client() as client:
        with pytest.raises(openai.APIStatusError) as e:
            client.completions.create(
                model="manta-demo", prompt="on", max_tokens=900, extra_body=body
            )
        assert e.value.status_code == 408 and e.value.code == "request_timeout"
        assert e.value.response.headers["x-should-retry"] == "false"
        stream = client.completions.create(
            model="manta-demo", prompt="on", max_tokens=900, extra_body=body, stream=True
        )
        with pytest.raises(openai.APIError, match=r"longer than its 0\.05 s"):
            list(stream)
    wait_until(demo.is_idle, what="a request that has timed out holds nothing")


def test_the_servers_limit_holds_for_all(tiny_model: Path) -> None:
    with serve_locally(
        model=str(tiny_model), served_model_name="tiny", request_timeout_s=0.01, num_blocks=64
    ) as server:
        with (
            server.slowed(),
            server.client() as client,
            pytest.raises(openai.APIStatusError) as e,
        ):
            client.completions.create(
                model="tiny", prompt="ab", max_tokens=60, extra_body={"timeout": 100, **LONG}
            )
        assert "0.01 s" in e.value.message
