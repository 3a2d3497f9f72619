"""Several models behind one address, without Ray: what goes where, and comes back."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray._common.utils import import_attr

from deployments.relay.door import TIMEOUT, build_door
from tests.deployments.scripted import ScriptedApi

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
CHATS = "/v1/chat/completions"
Applications = dict[str, ScriptedApi]


@pytest.fixture
def new_application(tmp_path: Path) -> Callable[..., ScriptedApi]:
    def new(name: str, **args: Any) -> ScriptedApi:
        directory = tmp_path / name
        directory.mkdir()
        api = ScriptedApi(directory, [], served_model_name=name, **args)
        api.says = f"I am {name}"
        return api

    return new


@pytest.fixture
def applications(tmp_path: Path, new_application: Callable[..., ScriptedApi]) -> Applications:
    keys = tmp_path / "keys"
    keys.write_text("acme:sk-acme\n")
    return {name: new_application(name, api_keys_file=str(keys)) for name in ("small", "large")}


class Prefixed(httpx.AsyncBaseTransport):
    """Serve's proxy: the application's path is what follows its route."""

    def __init__(self, applications: Applications) -> None:
        self.asked: list[str] = []  # routes
        self._applications = applications

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        route, _, path = request.url.path.removeprefix("/").partition("/")
        self.asked.append(route)
        if route not in self._applications:
            raise httpx.ConnectError("nobody there")
        application = self._applications[route].http
        asked = application.build_request(
            request.method, f"/{path}", headers=request.headers, content=await request.aread()
        )
        answer = await application.send(asked, stream=True)
        answer.headers.update({"date": "now", "server": "a proxy"})
        return answer


@asynccontextmanager
async def door(applications: Applications) -> AsyncIterator[tuple[httpx.AsyncClient, list[str]]]:
    """(a client of it, the routes that have been asked)"""
    proxy = Prefixed(applications)
    inner = httpx.AsyncClient(transport=proxy, base_url="http://proxy")
    api = build_door(inner, {name: f"/{name}" for name in [*applications, "away"]})
    headers = {"authorization": "Bearer sk-acme"}
    outer = httpx.ASGITransport(api)
    async with inner, httpx.AsyncClient(transport=outer, base_url="http://door") as http:
        http.headers.update(headers)
        yield http, proxy.asked


def through(
    applications: Applications, ask: Callable[[httpx.AsyncClient, list[str]], Awaitable[None]]
) -> None:
    async def run() -> None:
        async with door(applications) as (http, asked):
            await ask(http, asked)

    asyncio.run(run())


def test_the_model_in_the_body_chooses(applications: Applications) -> None:
    async def ask(http: httpx.AsyncClient, asked: list[str]) -> None:
        for model, says in (("large", "large"), ("small", "small"), (None, "small")):
            body = CHAT | ({"model": model} if model else {})
            answer = (await http.post(CHATS, json=body)).json()
            assert answer["choices"][0]["message"]["content"] == f"I am {says}"
        body = CHAT | {"model": "large", "stream": True}
        answer = await http.post(CHATS, json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(x[6:]) for x in answer.text.splitlines() if x[:7] == "data: {"]
        said = [event["choices"][0]["delta"].get("content") or "" for event in events]
        assert "".join(said) == "I am large"
        assert asked == ["large", "small", "small", "large"], "none starts for another's request"

    through(applications, ask)


def test_models_are_listed_and_only_the_first_is_asked(applications: Applications) -> None:
    async def ask(http: httpx.AsyncClient, asked: list[str]) -> None:
        models = (await http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["small", "large", "away"]
        assert asked == ["small"]
        assert (await http.get("/v1/models/large")).json()["id"] == "large"
        missing = await http.get("/v1/models/huge")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")

    through(applications, ask)


def test_a_response_is_found_where_it_was_made(applications: Applications) -> None:
    async def ask(http: httpx.AsyncClient, asked: list[str]) -> None:
        body = {"input": "hi", "model": "large"}
        path = f"/v1/responses/{(await http.post('/v1/responses', json=body)).json()['id']}"
        assert (await http.get(path)).json()["output"][0]["content"][0]["text"] == "I am large"
        assert (await http.delete(path)).json()["deleted"]

    through(applications, ask)


def test_what_names_no_model_is_the_first_applications(
    new_application: Callable[..., ScriptedApi],
) -> None:
    async def ask(http: httpx.AsyncClient, asked: list[str]) -> None:
        headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
        allowed = await http.options(CHATS, headers=headers)
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        listed = await http.get("/v1/models", headers=headers)
        assert listed.headers["access-control-allow-origin"] == "https://app.example"
        assert (await http.get("/version?a=b")).json().keys() == {"version"}
        assert "playground" in (await http.get("/")).text
        upload = await http.post("/v1/files", files={"file": b"{}"}, data={"purpose": "batch"})
        assert "keeps no files" in upload.json()["error"]["message"]
        assert set(asked) == {"small"}

    first = new_application("small", allowed_origins=["https://app.example"])
    through({"small": first, "large": new_application("large")}, ask)


def test_pages_are_judged_by_the_name_that_they_called(
    new_application: Callable[..., ScriptedApi],
) -> None:
    async def ask(http: httpx.AsyncClient, asked: list[str]) -> None:
        rebound = {"origin": "http://evil.example", "host": "evil.example"}
        answer = await http.post(CHATS, json=CHAT, headers=rebound)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
        assert (await http.get("/v1/models", headers=rebound)).status_code == 403

    through({"small": new_application("small")}, ask)


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "huge"}, 404, "the model 'huge' does not exist; there are: 'small', 'large'"),
        ({"model": "large", "tempratur": 1}, 400, "did you mean 'temperature'?"),
        ({"model": ["large"]}, 404, "does not exist"),
        ({"model": "away"}, 503, "/away does not answer"),
    ],
)
def test_what_is_wrong_is_said_in_the_apis_shape(
    body: dict[str, Any], status: int, says: str, applications: Applications
) -> None:
    async def ask(http: httpx.AsyncClient, asked: list[str]) -> None:
        answer = await http.post(CHATS, json=CHAT | body)
        assert answer.status_code == status and says in answer.json()["error"]["message"]
        answer = await http.post("/v1/messages", json=CHAT | {"max_tokens": 5} | body)
        assert answer.status_code == status and answer.json()["type"] == "error"

    through(applications, ask)


def test_a_body_that_is_no_json_is_the_applications_to_refuse(applications: Applications) -> None:
    async def ask(http: httpx.AsyncClient, asked: list[str]) -> None:
        json_type = {"content-type": "application/json"}
        for headers, status in ((json_type, 400), ({}, 415)):
            answer = await http.post(CHATS, content=b"{", headers=headers)
            assert answer.status_code == status and "error" in answer.json()
        assert "error" in (await http.put(CHATS, json=CHAT)).json()

    through(applications, ask)


def test_keys_are_the_applications_own(applications: Applications) -> None:
    async def ask(http: httpx.AsyncClient, asked: list[str]) -> None:
        http.headers["authorization"] = "Bearer sk-other"
        for method, path in (("POST", CHATS), ("GET", "/v1/models"), ("GET", "/v1/models/large")):
            answer = await http.request(method, path, json=CHAT | {"model": "large"})
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"

    through(applications, ask)


def test_what_the_proxy_says_itself_is_not_said_twice(applications: Applications) -> None:
    async def ask(http: httpx.AsyncClient, asked: list[str]) -> None:
        answer = await http.post(CHATS, json=CHAT)
        assert not {"date", "server", "x-request-id"} & answer.headers.keys()
        assert answer.headers["content-length"] == str(len(answer.content))

    through(applications, ask)


def test_its_name_is_one_thing_however_often_it_is_imported() -> None:
    names = [import_attr("deployments:door") for _ in range(2)]
    assert names[0] is names[1] and callable(names[0])


@pytest.mark.parametrize("begins", [False, True], ids=["before the answer", "in its midst"])
def test_a_client_that_goes_takes_its_request_with_it(begins: bool) -> None:
    """Also where its handler is cancelled again while it ends."""

    async def run() -> None:
        has_come, has_begun, has_gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def application(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            if begins:
                writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n")
            has_come.set()
            await reader.read()
            has_gone.set()
            writer.close()

        async def send(message: Any) -> None:
            if message.get("body"):
                has_begun.set()

        server = await asyncio.start_server(application, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        scope = {"type": "http", "method": "GET", "path": "/load", "headers": []}
        scope |= {"query_string": b"", "server": ("door", 80), "scheme": "http"}
        async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT) as http:
            api = build_door(http, {"small": "/small"})
            asked = asyncio.create_task(api(scope, asyncio.Event().wait, send))
            await (has_begun if begins else has_come).wait()
            for _ in range(2):
                asked.cancel()
                await asyncio.sleep(0)
            await asyncio.wait_for(has_gone.wait(), 5)
        server.close()

    asyncio.run(run())
