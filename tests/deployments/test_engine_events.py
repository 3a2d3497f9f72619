"""GET /engine/events: what whoever watches gets to see, and that it ends with the watching."""

import json
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer


def pictures(client: httpx.Client, url: str) -> Generator[dict[str, Any]]:
    with client.stream("GET", f"{url}/engine/events", timeout=10) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: {"):
                (replica,) = json.loads(line.removeprefix("data: "))["replicas"]
                assert replica["connected"]
                if replica["view"]:
                    yield replica["view"]


def test_watching_shows_a_running_request_and_leaves_no_trace(demo: LocalServer) -> None:
    prompts = [f"apple river stone {i}" for i in range(4)]
    body = {"prompt": prompts, "max_tokens": 600, "ignore_eos": True}
    with httpx.Client() as client, ThreadPoolExecutor() as thread:
        views = pictures(client, demo.url)
        first = next(views)
        assert first["rows"] == [] and set(first["pool"]) <= {".", "c"}
        with demo.slowed():
            load = thread.submit(httpx.post, f"{demo.url}/v1/completions", json=body, timeout=60)
            view = next(view for view in views if view["rows"])
        views.close()
        assert len(view["pool"]) == view["num_blocks"] == 600
        assert view["stats"]["running"] == len(view["rows"]) > 0
        for row in view["rows"]:
            assert row["cells"] and 0 < row["num_computed"] <= row["num_tokens"]
        assert {c[0] for s in view["steps"] for c in s["chunks"]} <= {r["id"] for r in view["rows"]}
        assert load.result().status_code == 200
    wait_until(lambda: demo.engine.step_log is None, 10, "the engine stops drawing")
    wait_until(demo.is_idle)


def test_the_stream_ends_after_a_while_so_that_replicas_can_retire(
    demo: LocalServer, monkeypatch: Any
) -> None:
    monkeypatch.setattr("deployments.api.routes.engine_events._LIFETIME_S", 0.3)
    answer = httpx.get(f"{demo.url}/engine/events", timeout=10)
    assert answer.text.endswith("data: [DONE]\n\n")
