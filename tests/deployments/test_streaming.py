"""What a stream costs on the way out: a write per step, the first token at once."""

import asyncio
import json
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.api import build_api
from deployments.api.streaming import Chunks, event, merge
from tests.deployments.in_process import InProcessApi, serve_in_process


@pytest.fixture(scope="module")
def api(tiny_model: Path) -> Iterator[InProcessApi]:
    # Without drafts, which bring several tokens at once.
    with serve_in_process(str(tiny_model), served_model_name="tiny", speculation="off") as api:
        yield api


async def _writes(api: InProcessApi, path: str, **body: Any) -> list[str]:
    """The bodies that the application hands to the HTTP server, one by one."""
    sent = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    writes: list[str] = []

    async def receive() -> Any:
        if sent:
            return sent.pop()
        await asyncio.Event().wait()  # the client stays

    async def send(message: Any) -> None:
        if message.get("body"):
            writes.append(message["body"].decode())

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
    }
    await build_api(api.front)(scope, receive, send)
    return writes


def test_one_write_per_step_for_all_choices(api: InProcessApi) -> None:
    steps_before = api.engine.num_steps
    writes = api.run(
        _writes(
            api,
            "/v1/completions",
            prompt=["ab", "cd"],
            n=3,
            max_tokens=20,
            ignore_eos=True,
            seed=1,
            stream=True,
        )
    )
    api.assert_idle()
    *steps, end = writes
    assert end == "data: [DONE]\n\n"
    events = "".join(steps).count("data: ")
    assert 100 < events <= 2 * 3 * 20  # tokens without text have none
    assert len(steps) <= api.engine.num_steps - steps_before + 1 < events / 2


def test_each_token_is_written_as_it_comes(api: InProcessApi) -> None:
    writes = api.run(
        _writes(
            api, "/v1/completions", prompt="ab", max_tokens=20, ignore_eos=True, seed=1, stream=True
        )
    )
    assert 15 < len(writes) <= 20 + 1
    assert all(write.count("data: ") == 1 for write in writes)


def test_merge_keeps_what_comes_together_together() -> None:
    """And ends when all streams have, or with the first failure."""

    async def ticks(
        step: asyncio.Condition, count: int, fails: bool = False
    ) -> AsyncGenerator[int]:
        for i in range(count):
            async with step:
                await step.wait()
            yield i
        if fails:
            raise RuntimeError("broken")

    async def run(*counts: int, fails: bool = False) -> list[list[tuple[int, int]]]:
        step = asyncio.Condition()
        streams = [ticks(step, count, fails) for count in counts]

        async def clock() -> None:
            while True:
                await asyncio.sleep(0.001)
                async with step:
                    step.notify_all()

        ticking = asyncio.create_task(clock())
        try:
            return [sorted(batch) async for batch in merge(streams)]
        finally:
            ticking.cancel()

    batches = asyncio.run(run(3, 2))
    assert sorted(item for batch in batches for item in batch) == [
        *((0, 0), (0, 1), (0, 2)),
        *((1, 0), (1, 1)),
    ]
    assert len(batches) <= 4
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(run(1, 10, fails=True))


def test_chunks_are_the_events_that_they_stand_for() -> None:
    head = {"id": "x", "model": 'a"b', "created": 1}
    choice = {"index": 0, "text": "ü\n</data>", "logprobs": None}
    assert Chunks(head).event(choice) == event(head | {"choices": [choice]})
