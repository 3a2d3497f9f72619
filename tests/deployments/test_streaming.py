"""What a stream costs on the way out: a write per step, the first token at once."""

import asyncio
import functools
import json
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.api import build_api
from deployments.api.streaming import Chunks, event
from deployments.front.arrivals import Arrivals
from deployments.front.front import Front
from engine.schedule.step import TokenDelta, TokenLogprobs
from tests.deployments.in_process import InProcessApi, serve_in_process
from tests.deployments.scripted import ScriptedApi


@pytest.fixture(scope="module")
def api(tiny_model: Path) -> Iterator[InProcessApi]:
    # Without drafts, which bring several tokens at once.
    with serve_in_process(str(tiny_model), served_model_name="tiny", speculation="off") as api:
        yield api


async def _writes(front: Front, path: str, **body: Any) -> list[str]:
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
    await build_api(front)(scope, receive, send)
    return writes


def test_one_write_per_step_for_all_choices(api: InProcessApi) -> None:
    steps_before = api.engine.num_steps
    writes = api.run(
        _writes(
            api.front,
            "/v1/completions",
            prompt=["ab", "cd"],
            n=3,
            max_tokens=20,
            ignore_eos=True,
            seed=1,
            stream=True,
            return_token_ids=True,
        )
    )
    api.assert_idle()
    *steps, end = writes
    assert end == "data: [DONE]\n\n"
    events = [line.removeprefix("data: ") for line in "".join(steps).split("\n\n") if line]
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    num_tokens = sum(len(choice["token_ids"]) for choice in choices)
    assert num_tokens == 2 * 3 * 20
    assert len(steps) <= api.engine.num_steps - steps_before + 1 < num_tokens / 2


def test_each_token_is_written_as_it_comes(tmp_path: Path) -> None:
    api = ScriptedApi(tmp_path, [])
    api.says = "each of them"
    writes = asyncio.run(_writes(api.front, "/v1/completions", prompt="ab", stream=True))
    assert len(writes) == len(api.front.tokenizer.encode(api.says)) + 2  # the end's, and [DONE]
    assert all(write.count("data: ") == 1 for write in writes)


@pytest.mark.parametrize("stop", [[], ["of"], ["each"], ["of them"]])
def test_steps_that_come_together_say_what_they_say_alone(tmp_path: Path, stop: list[str]) -> None:
    api = ScriptedApi(tmp_path, [])
    api.says = "each of them says it"

    def said() -> tuple[str, list[int], str, str, int]:
        options = dict(stop=stop, return_token_ids=True, logprobs=0, seed=3, max_tokens=100)
        events = asyncio.run(
            _writes(api.front, "/v1/completions", prompt="a", stream=True, **options)
        )
        *events, last, _ = "".join(events).split("\n\n")
        assert last == "data: [DONE]"
        last_id = [line for line in events[-1].splitlines() if line.startswith("id: ")]
        choices = [json.loads(e[e.index("data: ") + 6 :])["choices"][0] for e in events]
        tokens = [token for choice in choices for token in choice["token_ids"]]
        text = "".join(choice["text"] for choice in choices)
        return text, tokens, choices[-1]["finish_reason"], last_id[0], len(events)

    *alone, num_alone = said()
    api.is_ahead = True
    *together, num_together = said()
    assert together == alone and num_together == 1
    assert num_alone > 1 or stop == ["each"]
    position = len(alone[1])  # type: ignore[arg-type]
    assert alone[3] == f"id: 3.{position}"


def test_what_follows_an_id_follows_it_too_where_steps_come_together(tmp_path: Path) -> None:
    api = ScriptedApi(tmp_path, [])
    api.says = "each one of them, ö!"
    body = {"prompt": "a", "stream": True, "max_tokens": 100, "seed": 3, "logprobs": 0}
    body |= {"stop": ["e!", "oft", "one o!"], "return_token_ids": True}  # of which none comes

    def said(**headers: str) -> list[tuple[str, dict[str, Any]]]:
        """(id, choice) of every event."""
        ask = api.http.post("/v1/completions", json=body, headers=headers)
        *events, _, _ = asyncio.run(ask).text.split("\n\n")
        lines = (e.removeprefix("id: ").split("\ndata: ") for e in events)
        return [(event_id, json.loads(data)["choices"][0]) for event_id, data in lines]

    def joined(choices: list[dict[str, Any]]) -> list[Any]:
        own = [(c["text"], c["token_ids"], *c["logprobs"].values()) for c in choices]
        return [functools.reduce(operator.add, column) for column in zip(*own, strict=True)]

    alone = said()
    api.is_ahead = True
    for i, (last_id, _) in enumerate(alone[:-1]):
        rest = [choice for _, choice in said(**{"last-event-id": last_id})]
        assert joined(rest) == joined([choice for _, choice in alone[i + 1 :]])


def test_what_has_come_is_taken_at_once() -> None:
    """Then what has failed is raised, and nothing comes after it."""

    async def run() -> None:
        arrivals = Arrivals()
        taking = asyncio.create_task(arrivals.take())
        await asyncio.sleep(0)
        one, other = TokenDelta("a", [1], num_cached_tokens=3), TokenDelta("b", [2])
        arrivals.put(0, one, wakes=False)
        await asyncio.sleep(0)
        assert not taking.done()
        arrivals.put(1, other)
        assert await taking == {0: one, 1: other}
        logprobs = [TokenLogprobs(1, [token], [-1.0]) for token in (5, 6, 7)]
        arrivals.put(1, TokenDelta("b", [5], logprobs=logprobs[:1], waits=[0.5]))
        arrivals.put(
            1, TokenDelta("b", [6, 7], finish_reason="stop", stop_token=7, logprobs=logprobs[1:])
        )
        arrivals.fail(RuntimeError("broken"))
        arrivals.put(0, one)
        assert await arrivals.take() == {
            1: TokenDelta("b", [5, 6, 7], 0, "stop", 7, logprobs, waits=[0.5])
        }
        for _ in range(2):
            with pytest.raises(RuntimeError, match="broken"):
                await arrivals.take()
        taking = asyncio.create_task(Arrivals().take())
        await asyncio.sleep(0)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking

    asyncio.run(asyncio.wait_for(run(), 30))


def test_chunks_are_the_events_that_they_stand_for() -> None:
    head = {"id": "x", "model": 'a"b', "created": 1}
    choice = {"index": 0, "text": "ü\n</data>", "logprobs": None}
    assert Chunks(head).event(choice) == event(head | {"choices": [choice]})
