"""New weights in a server that runs: streams go on, all replicas have them, also after a crash."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray import serve

from deployments import app
from deployments.args import AppArgs
from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer, serve_locally
from tests.engine.test_new_weights import move

APP = "weights"
TINY: dict[str, Any] = {"served_model_name": "tiny", "dtype": "float32", "num_blocks": 64}
BODY: dict[str, Any] = {"prompt": "abc", "max_tokens": 20, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def others(tiny_model: Path, edited: Callable[..., Path]) -> Path:
    """As a step of learning leaves them: no tokenizer beside them."""
    return edited("qwen3", tensors=move)


@pytest.fixture
def tiny_server(tiny_model: Path) -> Iterator[LocalServer]:
    with serve_locally(model=str(tiny_model), **TINY, enable_weight_updates=True) as server:
        yield server


def update(url: str, path: Path) -> httpx.Response:
    body = {"model_path": str(path)}
    return httpx.post(f"{url}/update_weights_from_disk", json=body, timeout=60)


def said(url: str) -> tuple[str, str]:
    """(text, fingerprint)"""
    answer = httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).json()
    return answer["choices"][0]["text"], answer["system_fingerprint"]


def test_a_stream_goes_on_and_whoever_comes_is_answered_by_the_new_weights(
    tiny_server: LocalServer, tiny_model: Path, others: Path
) -> None:
    url = tiny_server.url
    before, fingerprint = said(url)
    streamed = BODY | {"stream": True, "max_tokens": 100}
    with tiny_server.slowed(), httpx.stream("POST", f"{url}/v1/completions", json=streamed) as late:
        lines = late.iter_lines()
        first = next(lines)
        assert update(url, others).json() == {"status": "updated"}
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert first and events[-1]["choices"][0]["finish_reason"] == "length"
    after, new_fingerprint = said(url)
    assert after != before and new_fingerprint != fingerprint
    (model,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert (model["id"], model["root"]) == ("tiny", str(others))
    assert update(url, tiny_model).status_code == 200
    assert said(url)[0] == before
    wait_until(tiny_server.is_idle)


def test_what_is_refused_names_its_field_and_leaves_the_weights(
    tiny_server: LocalServer, demo: LocalServer, tiny_model: Path, tmp_path: Path
) -> None:
    before = said(tiny_server.url)
    for server, path, told in (
        (tiny_server, tmp_path, "config.json"),
        (tiny_server, Path("manta-demo"), "is another model"),
        (demo, tiny_model, "no enable_weight_updates"),
    ):
        answer = update(server.url, path)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "model_path")
        assert told in error["message"]
    assert said(tiny_server.url) == before


def test_a_server_begins_with_the_weights_that_it_is_given(
    tiny_server: LocalServer, tiny_model: Path, others: Path
) -> None:
    update(tiny_server.url, others)
    wanted, _ = said(tiny_server.url)
    with serve_locally(model=str(tiny_model), **TINY, weights=str(others)) as server:
        assert said(server.url)[0] == wanted
    with pytest.raises(ValueError, match=r"weights: .* is another model"):
        serve_locally(model=str(tiny_model), weights="manta-demo").__enter__()


def replicas() -> list[psutil.Process]:
    name = f"ray::ServeReplica:{APP}:Replica"
    return [p for p in psutil.process_iter(["cmdline"]) if name in (p.info["cmdline"] or ())]


def test_all_replicas_have_them_after_a_crash_too(
    cluster: str, tiny_model: Path, others: Path
) -> None:
    args = AppArgs(
        model=str(tiny_model),
        **TINY,
        num_replicas=2,
        num_cpus_per_shard=0.5,
        enable_weight_updates=True,
    )
    serve.run(app(args), name=APP, route_prefix=f"/{APP}")
    url, handle = f"{cluster}/{APP}", serve.get_app_handle(APP)

    def weights() -> list[Any]:
        told = handle.broadcast("weights", args.model, args.weights)
        return told.results(timeout_s=10, return_exceptions=True)

    try:
        before, _ = said(url)
        refused = update(url, Path("manta-demo"))
        assert refused.status_code == 400
        assert "2 of 2 replicas cannot: model_path: " in refused.json()["error"]["message"]
        assert weights() == [None, None]
        assert update(url, others).json() == {"status": "updated"}
        assert weights() == [str(others)] * 2
        after, fingerprint = said(url)
        assert after != before
        for (shard,) in handle.broadcast("shard_pids").results(timeout_s=10):
            os.kill(shard, signal.SIGKILL)
        assert [said(url)[0] for _ in range(4)] == [after] * 4
        gone, _ = replicas()
        gone.kill()
        wait_until(lambda: len(replicas()) == 2 and gone not in replicas(), what="another begins")
        wait_until(lambda: weights() == [str(others)] * 2, what="it serves, with the same weights")
        assert {said(url) for _ in range(8)} == {(after, fingerprint)}
        deployed = args.model_copy(update={"weights": str(tiny_model)})
        serve.run(app(deployed), name=APP, route_prefix=f"/{APP}")
        assert {said(url)[0] for _ in range(4)} == {before}, "what is deployed counts again"
    finally:
        serve.delete(APP)
