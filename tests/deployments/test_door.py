"""Several models behind one address, without Ray: what goes where, and comes back."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.door.relay import build_door
from tests.deployments.scripted import ScriptedApi

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture
def applications(tmp_path: Path) -> dict[str, ScriptedApi]:
    found = {}
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
        (tmp_path / "keys").write_text("acme:sk-acme\n")
        keys = str(tmp_path / "keys")
        api = ScriptedApi(tmp_path / name, [], served_model_name=name, api_keys_file=keys)
        api.says = f"I am {name}"
        found[f"/{name}"] = api
    return found


class Prefixed(httpx.AsyncBaseTransport):
    """Serve's proxy: the application's path is what follows its route."""

    def __init__(self, applications: dict[str, ScriptedApi]) -> None:
        self._applications = applications

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        route, _, path = request.url.path.removeprefix("/").partition("/")
        if f"/{route}" not in self._applications:
            raise httpx.ConnectError("nobody there")
        application = self._applications[f"/{route}"].http
        asked = application.build_request(
            request.method, f"/{path}", headers=request.headers, content=await request.aread()
        )
        return await application.send(asked, stream=True)


@asynccontextmanager
async def door(applications: dict[str, ScriptedApi]) -> AsyncIterator[httpx.AsyncClient]:
    inner = httpx.AsyncClient(transport=Prefixed(applications), base_url="http://proxy")
    api = build_door(inner, [*applications, "/away"])
    async with (
        inner,
        httpx.AsyncClient(
            transport=httpx.ASGITransport(api),
            base_url="http://door",
            headers={"authorization": "Bearer sk-acme"},
        ) as http,
    ):
        yield http


def test_the_model_in_the_body_chooses(applications: dict[str, ScriptedApi]) -> None:
    async def run() -> None:
        async with door(applications) as http:
            models = (await http.get("/v1/models")).json()["data"]
            assert [model["id"] for model in models] == ["small", "large"]
            assert (await http.get("/v1/models/large")).json()["id"] == "large"
            for model, says in (("large", "large"), ("small", "small"), (None, "small")):
                body = CHAT | ({"model": model} if model else {})
                answer = (await http.post("/v1/chat/completions", json=body)).json()
                assert answer["choices"][0]["message"]["content"] == f"I am {says}"
            body = CHAT | {"model": "large", "stream": True}
            answer = await http.post("/v1/chat/completions", json=body)
            assert answer.headers["content-type"].startswith("text/event-stream")
            events = [json.loads(x[6:]) for x in answer.text.splitlines() if x[:7] == "data: {"]
            said = [event["choices"][0]["delta"].get("content") or "" for event in events]
            assert "".join(said) == "I am large"

    asyncio.run(run())


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "huge"}, 404, "the model 'huge' does not exist; there are: 'small', 'large'"),
        ({"model": "large", "tempratur": 1}, 400, "did you mean 'temperature'?"),
        ({"model": ["large"]}, 404, "does not exist"),
    ],
)
def test_what_is_wrong_is_said_in_openais_shape(
    body: dict[str, Any], status: int, says: str, applications: dict[str, ScriptedApi]
) -> None:
    async def run() -> None:
        async with door(applications) as http:
            answer = await http.post("/v1/chat/completions", json=CHAT | body)
            assert answer.status_code == status and says in answer.json()["error"]["message"]
            broken = await http.post("/v1/chat/completions", content=b"{")
            assert broken.status_code in (400, 415) and "error" in broken.json()

    asyncio.run(run())


def test_keys_are_the_applications_own(applications: dict[str, ScriptedApi]) -> None:
    async def run() -> None:
        async with door(applications) as http:
            http.headers["authorization"] = "Bearer sk-other"
            assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 401
            assert (await http.get("/v1/models")).json()["data"] == []

    asyncio.run(run())
