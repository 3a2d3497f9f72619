"""Requests that no honest client sends: each is refused in OpenAI's shape, and serving goes on."""

import json
from typing import Any

import httpx
import pytest

from deployments.api.schema import answers
from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
MESSAGES = '"messages": [{"role": "user", "content": "hi"}]'
TIMEOUT_S = 30


def send(server: LocalServer, path: str, body: str | bytes, **headers: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}{path}",
        content=body,
        headers={"content-type": "application/json"} | headers,
        timeout=TIMEOUT_S,
    )


def refuse(server: LocalServer, path: str, body: str | bytes, status: int = 400) -> str:
    """The message of the error."""
    answer = send(server, path, body)
    assert answer.status_code == status, answer.text[:500]
    error = answers.Error.model_validate_json(answer.content).error
    assert len(answer.content) < 4000, "an error does not repeat a large request"
    wait_until(server.is_idle)
    return f"{error.param}: {error.message}"


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1", '"hot"', "1e30"])
@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_temperatures_that_are_none(tiny: LocalServer, path: str, value: str) -> None:
    body = {CHAT: MESSAGES, TEXT: '"prompt": "a"', RESPONSES: '"input": "a"'}[path]
    assert "temperature" in refuse(tiny, path, f'{{{body}, "temperature": {value}}}')


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 10**9),
        ("n", 0),
        ("best_of", 10**9),
        ("max_tokens", -1),
        ("max_tokens", 10**30),
        ("min_tokens", 10**30),
        ("seed", 10**30),
        ("priority", 10**30),
        ("truncate_prompt_tokens", -(10**30)),
        ("logprobs", 10**9),
        ("logit_bias", {"1e3": 5}),
        ("logit_bias", {str(10**30): 5}),
        ("stop_token_ids", [10**30]),
        ("stop", ["a"] * 65),
        ("stop", [""]),
        ("timeout", 10**300),
        ("cache_salt", "s" * 257),
        ("cache_salt", 5),
        ("model", ["tiny"]),
        ("stream", "perhaps"),
        ("temprature", 0.5),
        ("__proto__", {}),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", 1]),
        ("prompt", [10**30]),
        ("prompt", {"text": "a"}),
        ("prompt", None),
        ("prompt", ""),
    ],
)
def test_values_that_make_no_sense(tiny: LocalServer, field: str, value: Any) -> None:
    said = refuse(tiny, TEXT, json.dumps({"prompt": "a"} | {field: value}))
    assert field in said


def test_unknown_fields_are_named_with_what_may_be_meant(tiny: LocalServer) -> None:
    said = refuse(tiny, TEXT, '{"prompt": "a", "max_token": 3}')
    assert said == "max_token: max_token: unknown field, did you mean 'max_tokens'? (got 3)"


@pytest.mark.parametrize("path", [CHAT, TEXT, RESPONSES])
def test_a_prompt_of_ten_megabytes(demo: LocalServer, path: str) -> None:
    """Is not tokenized to find out that it is too long: that would take many seconds."""
    text = "word " * 2_000_000
    body: dict[str, Any] = {
        CHAT: {"messages": [{"role": "user", "content": text}]},
        TEXT: {"prompt": ["a", text]},
        RESPONSES: {"input": text},
    }[path]
    assert "a window of 1024 tokens" in refuse(demo, path, json.dumps(body))


def test_a_long_prompt_is_tokenized_where_it_is_wanted(demo: LocalServer) -> None:
    text = "word " * 50_000
    answer = send(demo, "/tokenize", json.dumps({"prompt": text}))
    assert answer.status_code == 200 and answer.json()["count"] >= 50_000
    last = json.dumps({"prompt": text, "truncate_prompt_tokens": 5, "max_tokens": 1})
    assert send(demo, TEXT, last).json()["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TEXT, r'{"prompt": "\ud800"}'),
        (TEXT, r'{"prompt": ["a", "\udfff b"]}'),
        (TEXT, r'{"prompt": "a", "stop": "\ud800"}'),
        (TEXT, r'{"prompt": "a", "bad_words": ["\ud800"]}'),
        (TEXT, r'{"prompt": "a", "cache_salt": "\ud800"}'),
        (TEXT, r'{"prompt": "a", "model": "\ud800"}'),
        (TEXT, r'{"prompt": "a", "\ud800": 1}'),
        (TEXT, r'{"prompt": "a", "user": "\ud800"}'),
        (CHAT, r'{"messages": [{"role": "user", "content": "\ud800"}]}'),
        (CHAT, r'{"messages": [{"role": "\ud800", "content": "a"}]}'),
        ("/tokenize", r'{"prompt": "\ud800"}'),
        (RESPONSES, r'{"input": "\ud800"}'),
    ],
)
def test_lone_surrogates(demo: LocalServer, path: str, body: str) -> None:
    refuse(demo, path, body)


@pytest.mark.parametrize(
    "field",
    [
        '"chat_template_kwargs": {"note": VALUE}',
        '"tools": [{"type": "function", "function": {"name": "f", "parameters": {"a": VALUE}}}]',
        '"tools": [{"type": "function", "function": {"name": "f", "description": VALUE}}]',
    ],
)
@pytest.mark.parametrize("value", [r'"\ud800"', "NaN", nested(90), nested(900), "1" * 4000])
def test_what_reaches_the_template_as_it_is(demo: LocalServer, field: str, value: str) -> None:
    """Served or refused: the template decides."""
    body = f'{{{MESSAGES}, "max_tokens": 2, {field.replace("VALUE", value)}}}'
    answer = send(demo, CHAT, body)
    assert answer.status_code in (200, 400), answer.text[:500]
    if answer.status_code == 400:
        answers.Error.model_validate_json(answer.content)
    wait_until(demo.is_idle)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"bad_words": ["apple river stone " * 60]}, "at most 1000 characters"),
        ({"bad_words": ["apple river stone " * 25]}, "one of them is 76 tokens; at most 64"),
        (
            {"bad_words": [f"w{i}" for i in range(256)], "bad_words_token_ids": [[1]] * 1024},
            "with bad_words_token_ids they are 1536 sequences of tokens; at most 1024",
        ),
    ],
    ids=["characters", "tokens", "sequences"],
)
def test_bad_words_that_no_engine_takes(
    demo: LocalServer, fields: dict[str, Any], said: str
) -> None:
    """Are found out at the door, where words become tokens, not by an engine that dies of them."""
    told = refuse(demo, TEXT, json.dumps({"prompt": "a", "max_tokens": 2} | fields))
    assert told.startswith("bad_words") and said in told


@pytest.mark.parametrize(
    ("path", "fields", "field"),
    [
        (TEXT, '"guided_json": SCHEMA', "guided_json: there is no integer"),
        (
            TEXT,
            '"structured_outputs": {"json": SCHEMA}',
            "structured_outputs.json: there is no integer",
        ),
        (
            CHAT,
            '"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": '
            '{"type": "object", "properties": {"b": SCHEMA}}}}',
            "response_format: properties.b: there is no integer",
        ),
        (
            CHAT,
            '"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f", '
            '"parameters": {"type": "object", "properties": {"b": SCHEMA}}}}]',
            "parameters.properties.b: there is no integer",
        ),
    ],
)
def test_numbers_beyond_64_bits(demo: LocalServer, path: str, fields: str, field: str) -> None:
    """No integer of a grammar has them, and msgpack does not; a float may well begin there."""
    prompt = {TEXT: '"prompt": "a"', CHAT: MESSAGES}[path]
    body = f'{{{prompt}, "max_tokens": 2, {fields}}}'
    integer = f'{{"type": "integer", "minimum": {10**30}}}'
    assert field in refuse(demo, path, body.replace("SCHEMA", integer))
    number = integer.replace("integer", "number")
    answer = send(demo, path, body.replace("SCHEMA", number))
    assert answer.status_code == 200, answer.text
    wait_until(demo.is_idle)


@pytest.mark.parametrize("depth", [100, 1000, 100_000, 1_000_000])
@pytest.mark.parametrize("field", ["prompt", "logit_bias", "unknown"])
def test_deeply_nested_json(tiny: LocalServer, field: str, depth: int) -> None:
    refuse(tiny, TEXT, f'{{"{field}": {nested(depth)}}}')
    objects = '{"a":' * depth + "1" + "}" * depth
    refuse(tiny, TEXT, f'{{"{field}": {objects}}}')


@pytest.mark.parametrize(
    "body",
    [
        *("", "{", '{"prompt": "a"', '{"prompt": "a}', "[]", "null", "1", '"a"', "prompt=a"),
        *(b"\xff\xfe\x00", b'{"prompt": "\xff"}', '{"prompt": "a"} {"prompt": "b"}', "1" * 5000),
    ],
)
def test_what_is_no_json_object(tiny: LocalServer, body: str | bytes) -> None:
    refuse(tiny, TEXT, body)


@pytest.mark.parametrize("kind", ["text/plain", "application/xml", "multipart/form-data", "a/b/c"])
def test_a_wrong_content_type(tiny: LocalServer, kind: str) -> None:
    answer = send(tiny, TEXT, '{"prompt": "a"}', **{"content-type": kind})
    assert answer.status_code == 415
    assert "application/json" in answers.Error.model_validate_json(answer.content).error.message


def test_hostile_headers(tiny: LocalServer) -> None:
    """A request id that could break a log line or a response is not taken over."""
    for given in ("x" * 5000, "a\tb"):
        answer = send(tiny, TEXT, "{}", **{"x-request-id": given})
        assert answer.headers["x-request-id"].startswith("req_")


def test_it_still_serves(tiny: LocalServer, demo: LocalServer) -> None:
    for server in (tiny, demo):
        answer = send(server, TEXT, '{"prompt": "a", "max_tokens": 2}')
        assert answer.status_code == 200
        wait_until(server.is_idle)
