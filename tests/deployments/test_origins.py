"""Which web pages may use the server, and which names it takes for its own."""

import asyncio
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from deployments.api import build_api
from deployments.api.schema import answers
from deployments.args import AppArgs, ServiceArgs
from tests.deployments.local_server import LocalServer

APP = "https://app.example"
ASK = {"prompt": "a"}


def call(server: LocalServer, method: str, service: ServiceArgs, **request: Any) -> httpx.Response:
    """To an API before the server's front, with arguments of its own."""

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(build_api(server.front, service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.request(method, "/tokenize", **request)

    return asyncio.run(run())


def post(server: LocalServer, service: ServiceArgs | None = None, **headers: str) -> httpx.Response:
    return call(server, "POST", service or ServiceArgs(), json=ASK, headers=headers)


def preflight(server: LocalServer, service: ServiceArgs, origin: str) -> httpx.Response:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
    }
    return call(server, "OPTIONS", service, headers=asked)


@pytest.mark.parametrize(
    "host",
    [
        *("localhost:8000", "localhost", "127.0.0.1:8000", "192.168.7.7", "[::1]:8000", "manta"),
        *("manta.local:8000", "llm.default.svc.cluster.local", "llm.default.svc", "gpu.lan."),
    ],
)
def test_the_servers_own_page_at_a_name_that_nobody_else_can_own(
    demo: LocalServer, host: str
) -> None:
    assert post(demo, host=host, origin=f"http://{host}").status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "local.com"]
)
def test_a_page_whose_name_means_this_machine_for_a_while(demo: LocalServer, host: str) -> None:
    """As the browser sees it, it has the server's origin."""
    answer = post(demo, host=host, origin=f"http://{host}")
    assert answer.status_code == 403
    error = answers.Error.model_validate_json(answer.content).error
    assert error.code == "origin_not_allowed" and "allowed_origins" in error.message


def test_who_is_no_page_may_call_the_server_by_any_name(demo: LocalServer) -> None:
    assert post(demo, host="llm.example.com").status_code == 200


def test_a_public_name_of_ones_own(demo: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    page = {"host": "llm.example.com", "origin": "https://llm.example.com"}
    assert post(demo, **page).status_code == 403
    allowed = ServiceArgs(allowed_origins=["https://llm.example.com"])
    assert post(demo, allowed, **page).status_code == 200
    monkeypatch.setenv("MANTA_API_KEYS", "sk-one")
    assert post(demo, **page, authorization="Bearer sk-one").status_code == 200
    assert post(demo, **page).status_code == 401


@pytest.mark.parametrize(("allowed", "answered"), [(APP, APP), ("*", "*")])
def test_pages_of_other_origins_that_are_allowed(
    demo: LocalServer, monkeypatch: pytest.MonkeyPatch, allowed: str, answered: str
) -> None:
    """Browsers ask without the key; errors can be read, too."""
    service = ServiceArgs(allowed_origins=[allowed])
    monkeypatch.setenv("MANTA_API_KEYS", "sk-one")
    asked = preflight(demo, service, APP)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == answered
    assert {"GET", "POST", "DELETE"} <= set(
        asked.headers["access-control-allow-methods"].split(", ")
    )
    assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
    for key, status in (("sk-one", 200), ("sk-two", 401)):
        answer = post(demo, service, origin=APP, authorization=f"Bearer {key}")
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == answered
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


@pytest.mark.parametrize("allowed", [[], ["https://other.example"]])
def test_other_pages_are_told_nothing(demo: LocalServer, allowed: list[str]) -> None:
    service = ServiceArgs(allowed_origins=allowed)
    for answer in (preflight(demo, service, APP), post(demo, service, origin=APP)):
        assert "access-control-allow-origin" not in answer.headers
    assert preflight(demo, service, APP).status_code >= 400


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_what_a_page_can_send_without_asking_is_refused(
    demo: LocalServer, kind: str | None
) -> None:
    headers = {"origin": APP} | ({"content-type": kind} if kind else {})
    answer = call(demo, "POST", ServiceArgs(), content=b'{"prompt": "a"}', headers=headers)
    assert answer.status_code == 415
    assert "content-type: application/json" in answer.json()["error"]["message"]


def test_origins_on_the_command_line() -> None:
    args = AppArgs.model_validate({"allowed_origins": f"{APP}, http://localhost:3000"})
    assert args.allowed_origins == [APP, "http://localhost:3000"]
    for wrong in ("app.example", "https://app.example/", "https://app.example/path"):
        with pytest.raises(ValidationError, match="allowed_origins"):
            ServiceArgs(allowed_origins=[wrong])
