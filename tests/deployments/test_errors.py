"""What errors say: the field as the client has it, in words that are true, with OpenAI's codes."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseFailedEvent

from deployments.api.schema import answers
from deployments.batch.jsonl import JsonlFormat
from deployments.batch.rows import answer
from tests.deployments.in_process import serve_in_process
from tests.deployments.local_server import LocalServer

CHAT, TEXT, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ASK: list[Any] = [{"role": "user", "content": "hi"}]
MINIMAL: dict[str, dict[str, Any]] = {
    CHAT: {"messages": ASK},
    TEXT: {"prompt": "hi"},
    RESPONSES: {"input": "hi"},
    "/tokenize": {},
}
BAD_SCHEMA: dict[str, Any] = {"properties": {"a": {"not": {}}}}
NOT_CLOSED: dict[str, Any] = {"type": "string", "pattern": "(a"}  # which only the compiler finds


def tool(parameters: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


def named(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def flat(schema: dict[str, Any]) -> dict[str, Any]:
    return {"format": {"type": "json_schema", "name": "x", "schema": schema}}


def refused(server: LocalServer, path: str, body: str | dict[str, Any]) -> answers.ErrorDetail:
    """The error, of a status that it fits."""
    content = body if isinstance(body, str) else json.dumps(MINIMAL[path] | body)
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}{path}", content=content, headers=headers, timeout=30)
    assert response.status_code == 400, response.text[:500]
    return answers.Error.model_validate(response.json()).error


@pytest.mark.parametrize(
    ("path", "body", "param", "says"),
    [
        # Of two fields that do not go together, one is named.
        (TEXT, {"stream_options": {"include_usage": True}}, "stream_options", "when stream"),
        (TEXT, {"min_tokens": 20}, "min_tokens", "min_tokens: 20 must not exceed max_tokens (16)"),
        (TEXT, {"best_of": 1, "n": 2}, "best_of", "at least n (2)"),
        (TEXT, {"allowed_token_ids": [1], "bad_words": ["a"]}, "allowed_token_ids", "bad_words"),
        (CHAT, {"top_logprobs": 3}, "top_logprobs", "logprobs is true"),
        (CHAT, {"tool_choice": "required"}, "tool_choice", "no tools to choose from"),
        (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages.0.tool_call_id", "need"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ("/tokenize", {}, "prompt", "either prompt or messages"),
        # A path in the body, without the names of what it could have been.
        (TEXT, {"prompt": {"a": 1}}, "prompt", "a text, a list of token ids"),
        (TEXT, {"prompt": [1, "a"]}, "prompt.1", "a valid integer"),
        (TEXT, {"logit_bias": {"x": 1}}, "logit_bias.x", "a valid integer"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "a valid str"),
        (
            CHAT,
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0",
            "'image_url'",
        ),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "requ"),
        (CHAT, {"tool_choice": "sometimes"}, "tool_choice", "'sometimes'"),
        (RESPONSES, {"input": []}, "input", "at least 1"),
        (RESPONSES, {"input": [{"role": "king", "content": "a"}]}, "input.0.role", "'king'"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "a"}]}, "input.0", "type must be"),
        (TEXT, "{", None, "the body is not valid JSON"),
        (TEXT, "[1]", None, "a valid dictionary"),
        # What else it is called here is nobody's business.
        (
            CHAT,
            {"response_format": named({"type": "thing"})},
            "response_format",
            "type: 'thing' is",
        ),
        (CHAT, {"response_format": named(BAD_SCHEMA)}, "response_format", "properties.a: the"),
        (CHAT, {"response_format": named(NOT_CLOSED)}, "response_format", "response_format: Regex"),
        (TEXT, {"guided_regex": "(a"}, "guided_regex", "guided_regex: Regex parsing error"),
        (TEXT, {"structured_outputs": {"regex": "(a"}}, "structured_outputs", "structured_outputs"),
        (
            TEXT,
            {"structured_outputs": {"json": BAD_SCHEMA}},
            "structured_outputs.json.properties.a",
            "'not' is not supported",
        ),
        (TEXT, {"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "with guided_regex, which"),
        (
            CHAT,
            {"min_tokens": 5, "max_completion_tokens": 2},
            "min_tokens",
            "5 must not exceed max_completion_tokens (2)",
        ),
        (
            CHAT,
            {"tools": [tool({}), tool(BAD_SCHEMA)], "tool_choice": "required"},
            "tools.1.function.parameters.properties.a",
            "the keyword 'not'",
        ),
        (CHAT, {"tools": [tool(NOT_CLOSED)], "tool_choice": "required"}, "tools", "tools: Regex"),
        (
            RESPONSES,
            {"tools": [{"type": "function", "name": "f", "parameters": BAD_SCHEMA}]}
            | {"tool_choice": "required"},
            "tools.0.parameters.properties.a",
            "tools.0.parameters.properties.a: the keyword 'not'",
        ),
        (RESPONSES, {"text": flat(BAD_SCHEMA)}, "text.format", "text.format: properties.a: the"),
        (RESPONSES, {"text": flat(NOT_CLOSED)}, "text.format", "text.format: Regex parsing"),
        (RESPONSES, {"tool_choice": "required"}, "tool_choice", "no tools to choose from"),
        (RESPONSES, {"input": ASK * 5000}, "input", "input: 5000 are too many"),
    ],
)
def test_an_error_names_the_field_that_the_client_sent(
    demo: LocalServer, path: str, body: str | dict[str, Any], param: str | None, says: str
) -> None:
    error = refused(demo, path, body)
    assert (error.param, error.code, error.type) == (param, None, "invalid_request_error")
    assert says in error.message
    assert param is None or error.message.startswith(f"{param}:") or path == TEXT
    for internal in ("ArgsKwargs", "temperature", "StructuredOutputs(", "Message(", "_type_of"):
        assert internal not in error.message


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TEXT, {"prompt": "word " * 3000}, "prompt"),
        (TEXT, {"prompt": [5] * 2000}, "prompt"),
        (TEXT, {"prompt": "a" * 10**6}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "word " * 3000}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "a" * 10**6}]}, "messages"),
        (RESPONSES, {"input": "word " * 3000}, "input"),
        (RESPONSES, {"input": "a" * 10**6}, "input"),
    ],
)
def test_a_prompt_is_too_long_where_a_shorter_one_would_help(
    demo: LocalServer, path: str, body: dict[str, Any], param: str
) -> None:
    """Agents cut the conversation and try again."""
    error = refused(demo, path, body)
    assert (error.code, error.param) == ("context_length_exceeded", param)
    begins, ends = "This model's maximum context length is 1024 tokens. However, ", "is too long"
    assert error.message.startswith(begins) and error.message.endswith(ends)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [10**6]}, "prompt"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ],
)
def test_other_prompts_are_refused_for_what_is_wrong_with_them(
    demo: LocalServer, body: dict[str, Any], param: str
) -> None:
    error = refused(demo, TEXT, body)
    assert (error.code, error.param) == (None, param)


def test_a_chat_may_go_on_for_long(demo: LocalServer) -> None:
    """The default of max_tokens is the window's end there, not that of a completion."""
    response = httpx.post(f"{demo.url}{CHAT}", json={"messages": ASK, "min_tokens": 20, "seed": 1})
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] >= 20


@pytest.mark.parametrize("path", ["/v1/models/", "/health/", "/version/"])
def test_a_slash_at_the_end_changes_nothing(demo: LocalServer, path: str) -> None:
    slashed = httpx.get(f"{demo.url}{path}")
    assert slashed.status_code == 200
    assert slashed.json() == httpx.get(f"{demo.url}{path.rstrip('/')}").json()


def test_a_slash_at_the_end_of_a_post(demo: LocalServer) -> None:
    """No redirect, which behind a proxy that ends TLS would name the wrong scheme."""
    body = {"messages": ASK, "max_tokens": 1}
    assert httpx.post(f"{demo.url}{CHAT}/", json=body).status_code == 200


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_streams_end_tells_what_stopped_it(demo: LocalServer, path: str) -> None:
    words = "Repeat these words: apple river stone"
    body: dict[str, Any] = {"messages": [{"role": "user", "content": words}]}
    if path == TEXT:
        body = {"prompt": words, "max_tokens": 400, "temperature": 2, "seed": 1}
    body |= {"stop": ["e"]}
    whole = httpx.post(f"{demo.url}{path}", json=body).json()["choices"][0]
    assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", "e")
    text = httpx.post(f"{demo.url}{path}", json=body | {"stream": True}).text
    events = [line.removeprefix("data: ") for line in text.splitlines() if "data: {" in line]
    chunks = [json.loads(event)["choices"][0] for event in events]
    assert (chunks[-1]["finish_reason"], chunks[-1]["stop_reason"]) == ("stop", "e")
    assert not any("stop_reason" in chunk for chunk in chunks[:-1]), "costs nothing per token"


def test_a_response_that_fails_says_whose_fault_it_is(demo: LocalServer) -> None:
    with demo.client() as client:
        events = list(
            client.responses.create(
                model="manta-demo",
                input="hi",
                stream=True,
                extra_body={"timeout": 1e-6},
            )
        )
    (failed,) = [event for event in events if isinstance(event, ResponseFailedEvent)]
    assert failed.response.error is not None and failed.response.error.code == "server_error"


def test_every_answer_has_one_request_id(demo: LocalServer) -> None:
    for path in ("/v1/models", "/nowhere"):
        told = httpx.get(f"{demo.url}{path}", headers={"x-request-id": "mine"})
        assert told.headers.get_list("x-request-id") == ["mine"]


def test_rows_of_a_batch_have_a_response_or_an_error() -> None:
    """As OpenAI's: the error is of a row that got no response, not of a response of 4xx."""
    request = {"custom_id": "a", "method": "POST", "url": CHAT}
    bodies: list[Any] = [
        {"messages": ASK, "max_tokens": 1},
        {"messages": [], "max_tokens": 1},
        {"messages": ASK, "response_format": named(NOT_CLOSED)},
    ]
    lines = [json.dumps(request | {"body": body}).encode() for body in bodies] + [b"{"]
    formatted = JsonlFormat()
    rows = formatted.parse(lines)

    with serve_in_process("manta-demo") as api:

        async def ask() -> list[Any]:
            return await asyncio.gather(*(answer(api.front, row, {}, 1) for row in rows))

        told = api.run(ask())
    good, empty, no_type, broken = map(json.loads, formatted.encode(lines, rows, told).splitlines())
    assert good["response"]["status_code"] == 200 and good["error"] is None
    for line, param in ((empty, "messages"), (no_type, "response_format")):
        assert line["error"] is None and line["response"]["status_code"] == 400
        assert line["response"]["body"]["error"]["param"] == param
    assert broken["response"] is None and "not valid JSON" in broken["error"]["message"]


def test_openais_client_raises_what_it_raises_for_openai(demo: LocalServer) -> None:
    with demo.client() as client:
        with pytest.raises(openai.BadRequestError) as too_long:
            client.responses.create(model="manta-demo", input="word " * 3000)
        assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "input")
        with pytest.raises(openai.NotFoundError) as missing:
            client.models.retrieve("other")
        assert missing.value.code == "model_not_found"
