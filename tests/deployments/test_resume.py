"""Streams that break and go on: with what came before, the text is that of one that did not."""

import json
import runpy
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from deployments.cli.client import Client, ServerError
from tests.deployments.cutting_proxy import cut_after
from tests.deployments.in_process import InProcessApi, serve_in_process
from tests.deployments.local_server import LocalServer

ASK = {
    "messages": [{"role": "user", "content": "Repeat these words: apple river stone cloud"}],
    "temperature": 0.8,
    "max_tokens": 40,
}
SEEDED = ASK | {"seed": 5}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ROOT = Path(__file__).resolve().parent.parent.parent
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
BODIES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": (CHAT, ASK),
    "text": (TEXT, {"prompt": "apple river", "max_tokens": 24, "temperature": 1.0}),
    "stop": (TEXT, {"prompt": "ab", "max_tokens": 24, "stop": ["e", "zz"], "temperature": 1.0}),
    "logprobs": (TEXT, {"prompt": "ab", "max_tokens": 24, "logprobs": 1, "temperature": 1.0}),
    "chat logprobs": (CHAT, ASK | {"logprobs": True}),
    "call": (
        CHAT,
        ASK
        | {
            "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
            "max_tokens": 30,
            "tools": [WEATHER],
            "temperature": 0,
        },
    ),
    "one call": (
        CHAT,
        ASK
        | {
            "messages": [{"role": "user", "content": "What is the weather in Paris and London?"}],
            "max_tokens": 60,
            "tools": [WEATHER],
            "temperature": 0.3,
            "parallel_tool_calls": False,
        },
    ),
    "form": (CHAT, ASK | {"structured_outputs": {"regex": "[a-z]{3}( [0-9]{2}){4}"}}),
    "thoughts": (
        CHAT,
        ASK | {"chat_template_kwargs": {"enable_thinking": True}, "max_tokens": 60},
    ),
}


@pytest.fixture(scope="module")
def api() -> Iterator[InProcessApi]:
    with serve_in_process("manta-demo", max_model_len=512) as api:
        yield api


class Event:
    def __init__(self, text: str) -> None:
        fields = dict(line.split(": ", 1) for line in text.splitlines())
        self.id = fields.get("id", "")
        self.choice: dict[str, Any] = {}
        if fields["data"] != "[DONE]":
            self.choice = next(iter(json.loads(fields["data"])["choices"]), {})


def stream(api: InProcessApi, path: str, body: dict[str, Any], **headers: str) -> list[Event]:
    answer = api.run(api.http.post(path, json=body | {"stream": True}, headers=headers))
    assert answer.status_code == 200, answer.text
    events = [Event(text) for text in answer.text.split("\n\n") if text]
    assert not events.pop().choice
    return events


def said(events: list[Event]) -> list[Any]:
    """All fields of the choice's deltas, each put together; and how it ended."""
    fields: dict[str, Any] = {}
    for event in events:
        content = dict(event.choice.get("delta") or {"text": event.choice.get("text")})
        for call in content.pop("tool_calls", ()):
            for name in ("name", "arguments"):
                content[name] = content.get(name, "") + call["function"].get(name, "")
        content |= event.choice.get("logprobs") or {}
        content |= {"token_ids": event.choice.get("token_ids")}
        for name, value in content.items():
            if value:
                fields[name] = fields[name] + value if name in fields else value
    return [fields, events[-1].choice["finish_reason"]]


@pytest.mark.parametrize("kind", BODIES)
def test_what_follows_an_id_is_what_would_have_followed(kind: str, api: InProcessApi) -> None:
    path, body = BODIES[kind]
    body = body | {"return_token_ids": True}
    whole = stream(api, path, body | {"seed": 11})
    places = [i for i, event in enumerate(whole) if event.id]
    assert places and {whole[i].id.split(".")[0] for i in places} == {"11"}
    for i in {*places[:: max(len(places) // 3, 1)], places[-1]}:
        before, position = whole[: i + 1], int(whole[i].id.split(".")[1])
        tokens = [t for event in before for t in event.choice.get("token_ids") or ()]
        assert len(tokens) == position
        # By number, by the tokens; the seed comes with the place.
        rest = stream(api, path, body, **{"last-event-id": whole[i].id})
        assert said(before + rest) == said(whole)
        if "logprobs" not in body:
            rest = stream(api, path, body | {"resume": {"seed": 11, "token_ids": tokens}})
            assert said(before + rest) == said(whole)
    api.assert_idle()


@pytest.mark.parametrize(
    ("body", "ending"),
    [
        (BODIES["call"][1], "tool_calls"),
        (ASK | {"max_tokens": 9, "ignore_eos": True}, "length"),
        (ASK | {"max_tokens": None, "ignore_eos": True}, "length"),  # the window's end
        (ASK | {"stop": ["e"], "temperature": 0}, "stop"),
    ],
)
def test_of_a_text_that_is_all_there_only_the_end_is_told(
    body: dict[str, Any], ending: str, api: InProcessApi
) -> None:
    body = body | {"seed": 2, "return_token_ids": True}
    whole = stream(api, CHAT, body)
    tokens = [t for event in whole for t in event.choice.get("token_ids") or ()]
    api.assert_idle()  # also what was made beyond a stop string has ended
    made = api.engine.scheduler.stats.output_tokens
    rest = stream(api, CHAT, body | {"resume": {"seed": 2, "token_ids": tokens}})
    assert said(rest) == [{}, ending] and said(whole)[1] == ending
    assert rest[-1].id == whole[-1].id
    assert rest[-1].choice["stop_reason"] == whole[-1].choice["stop_reason"]
    assert api.engine.scheduler.stats.output_tokens == made
    api.assert_idle()


def test_tokens_that_are_there_are_not_made_again(api: InProcessApi) -> None:
    path, body = BODIES["text"]
    whole = stream(api, path, body | {"return_token_ids": True, "seed": 3, "ignore_eos": True})
    tokens = [t for event in whole for t in event.choice["token_ids"]]
    made = api.engine.scheduler.stats.output_tokens
    body = body | {"ignore_eos": True, "resume": {"seed": 3, "token_ids": tokens[:20]}}
    rest = stream(api, path, body)
    assert said(rest)[0]["text"] and rest[-1].id == "3.24"
    assert api.engine.scheduler.stats.output_tokens - made == 4


def test_a_text_goes_on_where_its_tokens_are_the_models_own(api: InProcessApi) -> None:
    path, body = CHAT, ASK | {"temperature": 0}
    content, ending = said(stream(api, path, body | {"return_token_ids": True}))
    tokens = content["token_ids"]
    text = api.front.tokenizer.decode(tokens[: len(tokens) // 2])
    rest = said(stream(api, path, body | {"resume": {"seed": 0, "text": text}}))
    assert 0 < len(text) < len(content["content"])
    assert [text + rest[0]["content"], rest[1]] == [content["content"], ending]


@pytest.mark.parametrize(
    ("options", "headers", "says"),
    [
        ({"resume": {"seed": 1, "token_ids": [5]}, "n": 2}, {}, "a stream of one choice"),
        ({"resume": {"seed": 1, "token_ids": [5]}, "stream": False}, {}, "a stream of one choice"),
        ({"resume": {"seed": 1}}, {}, "one of position, token_ids and text"),
        ({"resume": {"seed": 1, "token_ids": [10**6]}}, {}, "outside the vocabulary"),
        ({"resume": {"seed": 1, "token_ids": [5] * 41}}, {}, "more than max_tokens allows"),
        ({}, {"last-event-id": "5"}, "SEED.POSITION"),
        ({}, {"last-event-id": "x.1"}, "SEED.POSITION"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused(
    options: dict[str, Any], headers: dict[str, str], says: str, api: InProcessApi
) -> None:
    body = ASK | {"stream": True} | options
    answer = api.run(api.http.post(CHAT, json=body, headers=headers))
    assert answer.status_code == 400 and says in answer.json()["error"]["message"], answer.text


def test_streams_of_several_choices_have_no_ids(api: InProcessApi) -> None:
    answer = api.post(TEXT, prompt="ab", n=2, max_tokens=4, stream=True)
    assert "id: " not in answer.text and answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("has_tokens", [False, True])
def test_our_client_goes_on_by_itself(has_tokens: bool, demo: LocalServer) -> None:
    body = ASK | {"seed": 5, "stream": True, "stream_options": {"include_usage": True}}
    body |= {"return_token_ids": has_tokens}

    def ask(url: str) -> tuple[str, int, str]:
        text, ending, count = "", "", 0
        for event in Client(url).stream(CHAT, body):
            count = (event.get("usage") or {}).get("completion_tokens", count)
            for choice in event["choices"]:
                text += choice["delta"].get("content") or ""
                ending = choice["finish_reason"] or ending
        return text, count, ending

    whole = ask(demo.url)
    assert len(whole[0]) > 10
    # Before the first id, in the midst, within an event, and before there is an answer again.
    for sizes in ((450,), (700, 1300), (1000, 900, 0, 801)):
        with cut_after(demo.url, *sizes) as url:
            assert ask(url) == whole


# As Serve's proxy and HAProxy say that a replica is gone, or that none is there yet.
LOST = b"HTTP/1.1 500 Internal Server Error\r\nconnection: close\r\n\r\nInternal Server Error"
EARLY = b"HTTP/1.1 404 Not Found\r\nconnection: close\r\n\r\nPath '/v1/completions' not found."


def _by_our_client(url: str) -> str:
    chunks = Client(url).stream(CHAT, SEEDED | {"stream": True})
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def _by_the_example(url: str) -> str:
    example = runpy.run_path(str(ROOT / "docs" / "examples" / "resume.py"))
    return "".join(example["stream"](f"{url}{CHAT}", SEEDED))


@pytest.mark.parametrize("said_by", [_by_our_client, _by_the_example])
def test_a_stream_goes_on_elsewhere_where_a_replica_says_that_it_must_stop(
    said_by: Callable[[str], str],
) -> None:
    """As one that has been drained for as long as it may."""
    asked: list[str | None] = []

    class Replica(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.headers["last-event-id"])
            self.send_response(200)
            self.end_headers()
            code = "engine_unavailable" if len(asked) == 1 else "engine_failed"
            error = {"message": "shutting down", "code": code}
            for number, content in enumerate((f"{len(asked)}a", f"{len(asked)}b")):
                event = {"choices": [{"index": 0, "delta": {"content": content}}]}
                self.wfile.write(f"id: 5.{number}\ndata: {json.dumps(event)}\n\n".encode())
            ending = "[DONE]" if len(asked) == 2 else json.dumps({"error": error})
            self.wfile.write(f"data: {ending}\n\ndata: [DONE]\n\n".encode())

    server = HTTPServer(("127.0.0.1", 0), Replica)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert said_by(url) == "1a1b2a2b" and asked == [None, "5.1"]
        with pytest.raises((ServerError, RuntimeError), match="shutting down"):
            said_by(url)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("said_by", [_by_our_client, _by_the_example])
def test_what_a_proxy_says_is_no_refusal(said_by: Callable[[str], str], demo: LocalServer) -> None:
    """The stream goes on, or begins, when there is a replica again."""
    whole = said_by(demo.url)
    for answers in ((700, LOST, EARLY), (LOST,)):
        with cut_after(demo.url, *answers) as url:
            assert said_by(url) == whole
    with cut_after(demo.url, *[EARLY] * 9) as url, pytest.raises(ServerError, match="404"):
        _by_our_client(url)  # what has never been a server of ours


def test_our_client_gives_up_on_what_was_never_there(demo: LocalServer) -> None:
    with cut_after(demo.url, 0) as url, pytest.raises(ServerError, match="no server of ours"):
        list(Client(url).stream(CHAT, ASK | {"stream": True}))
