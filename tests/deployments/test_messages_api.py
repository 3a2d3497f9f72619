"""Anthropic's Messages API, asked by the real `anthropic` client."""

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from deployments.api.schema import message_answers
from deployments.api.schema.message_request import MessagesRequest
from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer, serve_locally

WORDS = "Repeat these words: apple river stone"
USER: Any = {"role": "user", "content": WORDS}
WEATHER: Any = {
    "name": "get_weather",
    "description": "Get the current weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city name"}},
        "required": ["city"],
    },
}
TIMER: Any = {
    "name": "set_timer",
    "description": "Start a timer.",
    "input_schema": {
        "type": "object",
        "properties": {"minutes": {"type": "integer", "description": "How many minutes"}},
        "required": ["minutes"],
    },
}
GREEDY = {"temperature": 0}  # which newer versions of the client do not know
QUESTION: Any = {"role": "user", "content": "What is the weather in Paris?"}
SUM: Any = {"role": "user", "content": "What is 12 + 30?"}


@pytest.fixture(scope="module")
def client(demo: LocalServer) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=demo.url, api_key="none", max_retries=0) as client:
        yield client


def ask(client: anthropic.Anthropic, *messages: Any, **options: Any) -> Message:
    """Greedily; whatever comes is what the document says."""
    options = {"model": "manta-demo", "max_tokens": 100} | options
    options["extra_body"] = GREEDY | options.get("extra_body", {})
    raw = client.messages.with_raw_response.create(messages=list(messages), **options)
    message_answers.Message.model_validate_json(raw.http_response.content, strict=True)
    return raw.parse()


def events_of(demo: LocalServer, **body: Any) -> list[dict[str, Any]]:
    """Of a stream, each strictly one of the client's own types."""
    adapter: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    body = {"max_tokens": 100, "temperature": 0, "stream": True} | body
    events = []
    for block in httpx.post(f"{demo.url}/v1/messages", json=body).text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        adapter.validate_python(event)
        events.append(event)
    return events


def test_a_message(demo: LocalServer, client: anthropic.Anthropic) -> None:
    message = ask(client, USER)
    (block,) = message.content
    assert block.type == "text" and block.text == "apple river stone"
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    assert message.usage.output_tokens > 3 and message._request_id
    wait_until(demo.is_idle)


@pytest.mark.parametrize(
    ("options", "text", "reason", "sequence"),
    [
        ({"max_tokens": 2}, None, "max_tokens", None),
        ({"stop_sequences": [" river"]}, "apple", "stop_sequence", " river"),
        ({"stop_sequences": [" sea"]}, "apple river stone", "end_turn", None),
    ],
)
def test_why_a_message_ends(
    client: anthropic.Anthropic, options: Any, text: str | None, reason: str, sequence: str | None
) -> None:
    message = ask(client, USER, **options)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)
    assert text is None or message.content[0].text == text  # type: ignore[union-attr]


def test_the_end_of_the_window_is_a_reason_of_its_own(client: anthropic.Anthropic) -> None:
    words: Any = {"role": "user", "content": "a " * 950}
    message = ask(client, words, max_tokens=2000, extra_body={"min_p": 0.0})
    assert message.stop_reason in ("end_turn", "model_context_window_exceeded")
    assert message.usage.output_tokens < 1024


def test_a_streams_events_in_their_order(demo: LocalServer, client: anthropic.Anthropic) -> None:
    whole = ask(client, USER)
    events = events_of(demo, messages=[USER])
    deltas = [e["delta"]["text"] for e in events if e["type"] == "content_block_delta"]
    assert deltas and "".join(deltas) == whole.content[0].text  # type: ignore[union-attr]
    assert [event["type"] for event in events] == [
        *("message_start", "content_block_start"),
        *["content_block_delta"] * len(deltas),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    first, last = events[0]["message"]["usage"], events[-2]["usage"]
    assert last["output_tokens"] == whole.usage.output_tokens >= first["output_tokens"]
    with client.messages.stream(
        model="manta-demo", max_tokens=100, messages=[USER], extra_body=GREEDY
    ) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text  # type: ignore[union-attr]
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_tool_is_used_and_its_result_answered_from(
    demo: LocalServer, client: anthropic.Anthropic, stream: bool
) -> None:
    options: Any = {"tools": [WEATHER, TIMER], "model": "manta-demo", "max_tokens": 100}
    if stream:
        with client.messages.stream(messages=[QUESTION], extra_body=GREEDY, **options) as events:
            asked = events.get_final_message()
    else:
        asked = ask(client, QUESTION, **options)
    assert asked.stop_reason == "tool_use"
    (call,) = asked.content
    assert call.type == "tool_use" and (call.name, call.input) == (
        "get_weather",
        {"city": "Paris"},
    )
    result: Any = {
        "type": "tool_result",
        "tool_use_id": call.id,
        "content": [{"type": "text", "text": '{"temperature": 21, "condition": "sunny"}'}],
    }
    messages: Any = [{"role": "assistant", "content": asked.content}]
    told = ask(client, QUESTION, *messages, {"role": "user", "content": [result]}, **options)
    assert told.content[0].text == "It is 21 degrees and sunny in Paris."  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("choice", "kinds"),
    [
        ({"type": "any"}, ["tool_use"]),
        ({"type": "tool", "name": "set_timer"}, ["tool_use"]),
        ({"type": "none"}, ["text"]),
        ({"type": "auto", "disable_parallel_tool_use": True}, ["tool_use"]),
    ],
)
def test_a_choice_among_tools(client: anthropic.Anthropic, choice: Any, kinds: list[str]) -> None:
    question: Any = {"role": "user", "content": "What is the weather in Paris and Oslo?"}
    message = ask(client, question, tools=[WEATHER, TIMER], tool_choice=choice)
    assert [block.type for block in message.content] == kinds
    if choice["type"] == "tool":
        assert message.content[0].name == "set_timer"  # type: ignore[union-attr]


def test_a_form_is_kept(client: anthropic.Anthropic) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    config: Any = {"format": {"type": "json_schema", "schema": schema}}
    message = ask(client, SUM, output_config=config)
    assert json.loads(message.content[0].text)["n"] is not None  # type: ignore[union-attr]


def test_thinking_is_a_block_before_the_text(client: anthropic.Anthropic) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 1024}
    message = ask(client, SUM, thinking=thinking)
    thought, text = message.content
    assert thought.type == "thinking" and thought.thinking and thought.signature
    assert text.type == "text" and "42" in text.text and "think" not in text.text
    assert message.usage.output_tokens_details is not None
    assert message.usage.output_tokens_details.thinking_tokens > 3
    with client.messages.stream(
        model="manta-demo", max_tokens=100, messages=[SUM], thinking=thinking, extra_body=GREEDY
    ) as stream:
        blocks = stream.get_final_message().content
        assert [block.to_dict() for block in blocks] == [b.to_dict() for b in message.content]
    off = ask(client, SUM, thinking={"type": "disabled"})
    assert [block.type for block in off.content] == ["text"]
    hidden = ask(client, SUM, thinking=thinking | {"display": "omitted"})
    assert hidden.content[0].thinking == ""  # type: ignore[union-attr]
    assert hidden.content[1] == text


def test_thinking_ends_when_its_budget_is_spent(client: anthropic.Anthropic) -> None:
    thinking: Any = {"type": "enabled", "budget_tokens": 5}
    message = ask(client, SUM, thinking=thinking)
    thought, text = message.content
    assert message.usage.output_tokens_details is not None
    assert message.usage.output_tokens_details.thinking_tokens <= 5
    assert thought.type == "thinking" and text.type == "text" and text.text
    free = ask(client, SUM, thinking=thinking | {"budget_tokens": 500})
    assert free.content[0].thinking.startswith(thought.thinking)  # type: ignore[union-attr]
    assert free.content[0] != thought


def test_thoughts_words_and_calls_come_back_as_one_turn() -> None:
    assistant = [
        {"type": "redacted_thinking", "data": "x"},
        {"type": "thinking", "thinking": "Look.", "signature": "s"},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "1", "name": "f", "input": {"a": "é"}},
        {"type": "tool_use", "id": "2", "name": "g", "input": {}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "1", "content": "one"},
        {
            "type": "tool_result",
            "tool_use_id": "2",
            "is_error": True,
            "content": [
                {"type": "text", "text": "no"},
                {
                    "type": "document",
                    "title": "Notes",
                    "source": {"type": "text", "media_type": "text/plain", "data": "such"},
                },
            ],
        },
        {"type": "text", "text": "Go on."},
        {"type": "text", "text": "Now."},
    ]
    body = {
        "max_tokens": 5,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            USER,
            {"role": "assistant", "content": assistant},
            {"role": "user", "content": results},
        ],
    }
    chat = MessagesRequest.model_validate(body).to_chat()
    said = [message.for_template() for message in chat.messages]
    assert [message["role"] for message in said] == [
        *("system", "user", "assistant", "tool", "tool", "user")
    ]
    _, _, turn, one, two, more = said
    assert (turn["reasoning_content"], turn["content"]) == ("Look.", "I look.")
    arguments = [call["function"]["arguments"] for call in turn["tool_calls"]]
    assert arguments == [{"a": "é"}, {}]
    assert (one["content"], one["tool_call_id"]) == ("one", "1")
    assert two["content"] == "Error: no\nNotes\nsuch"
    assert more["content"] == "Go on.\nNow."


def test_an_answer_that_has_begun_is_continued(client: anthropic.Anthropic) -> None:
    begun: Any = {"role": "assistant", "content": "apple river"}
    assert ask(client, USER, begun).content[0].text == " stone"  # type: ignore[union-attr]


def test_tokens_are_counted_as_the_prompt_has_them(client: anthropic.Anthropic) -> None:
    options: Any = {"tools": [WEATHER], "system": "Be brief."}
    counted = client.messages.count_tokens(model="manta-demo", messages=[QUESTION], **options)
    usage = ask(client, QUESTION, **options, max_tokens=1).usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    long = client.messages.count_tokens(
        model="manta-demo", messages=[{"role": "user", "content": "word " * 5000}]
    )
    assert long.input_tokens > 5000, "also what does not fit the window"


# Prefixes are found again. What peers' clients and servers lost them by, each a test


def cached_of(message: Message) -> tuple[int, int]:
    """(tokens found in the cache, all tokens) of a prompt."""
    cached = message.usage.cache_read_input_tokens
    assert cached is not None and message.usage.cache_creation_input_tokens == 0
    return cached, cached + message.usage.input_tokens


LONG = "You are an agent that follows all of these rules. " + "Rule: be kind. " * 30


def test_a_line_that_changes_with_every_request_hides_no_prefix(
    client: anthropic.Anthropic,
) -> None:
    def system(number: int) -> Any:
        line = f"x-anthropic-billing-header: cc_version=2.1.{number}; cch=0{number}f3a;"
        return [{"type": "text", "text": line}, {"type": "text", "text": LONG}]

    salt: Any = {"cache_salt": "billing"}
    _, size = cached_of(ask(client, USER, system=system(1), max_tokens=1, extra_body=salt))
    cached, same = cached_of(ask(client, USER, system=system(2), max_tokens=1, extra_body=salt))
    assert same == size and cached > size - 32
    in_one: Any = system(3)[0]["text"] + "\n" + LONG
    cached, _ = cached_of(ask(client, USER, system=in_one, max_tokens=1, extra_body=salt))
    assert cached > size - 32


def test_a_system_message_stays_where_it_is(client: anthropic.Anthropic) -> None:
    """At the front it would change the beginning of a prompt that is there already."""
    salt: Any = {"cache_salt": "system"}
    history: list[Any] = [USER, {"role": "assistant", "content": "apple river stone"}, USER]
    _, size = cached_of(ask(client, *history, system=LONG, max_tokens=1, extra_body=salt))
    note: Any = {"role": "system", "content": "The user has opened a file."}
    later = [*history, {"role": "assistant", "content": "apple river stone"}, note, USER]
    cached, _ = cached_of(ask(client, *later, system=LONG, max_tokens=1, extra_body=salt))
    assert cached > size - 32
    body = {"max_tokens": 1, "messages": later, "system": LONG}
    roles = [message.role for message in MessagesRequest.model_validate(body).to_chat().messages]
    assert roles[0] == "system" and roles[-2:] == ["system", "user"]


def test_tools_in_another_order_are_the_same_tools(client: anthropic.Anthropic) -> None:
    salt: Any = {"cache_salt": "tools"}
    options: Any = {"max_tokens": 1, "extra_body": salt}
    _, size = cached_of(ask(client, QUESTION, tools=[WEATHER, TIMER], **options))
    cached, same = cached_of(ask(client, QUESTION, tools=[TIMER, WEATHER], **options))
    assert same == size and cached > size - 32


def test_usage_counts_what_the_cache_gave(demo: LocalServer, client: anthropic.Anthropic) -> None:
    """Whole and in both of a stream's counts, so that the sum is the prompt and the rest is new."""
    body: Any = {"messages": [USER], "system": LONG, "cache_salt": "usage", "max_tokens": 3}
    ask(client, USER, system=LONG, extra_body={"cache_salt": "usage"}, max_tokens=3)
    events = events_of(demo, **body)
    for usage in (events[0]["message"]["usage"], events[-2]["usage"]):
        assert usage["cache_read_input_tokens"] > 100 > usage["input_tokens"] > 0


# What is refused, and how


def test_tools_that_a_provider_runs_are_left_out_and_named(client: anthropic.Anthropic) -> None:
    search: Any = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
    raw = client.messages.with_raw_response.create(
        model="manta-demo", max_tokens=20, messages=[QUESTION], tools=[search, WEATHER]
    )
    assert raw.headers["x-tools-left-out"] == "web_search_20250305"
    alone = client.messages.count_tokens(
        model="manta-demo", messages=[QUESTION], tools=[search, WEATHER]
    )
    with_it = client.messages.count_tokens(model="manta-demo", messages=[QUESTION], tools=[WEATHER])
    assert alone == with_it


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"extra_body": {"max_token": 3}}, "max_token: unknown field, did you mean 'max_tokens'"),
        ({"tool_choice": {"type": "any"}}, "tool_choice: there are no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice: a tool's name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "auto", "name": "a"}}, "tool_choice: a tool"),
        ({"tools": [{"name": "f", "type": "thing"}]}, "type must be custom"),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages.0.content",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "a"}]}]},
            "thinking block is the assistant's",
        ),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "prompt is too long"),
        (
            {
                "tools": [
                    {
                        "name": "f",
                        "input_schema": {
                            "type": "object",
                            "properties": {"a": {"type": "array", "uniqueItems": True}},
                        },
                    }
                ],
                "tool_choice": {"type": "any"},
            },
            "tools.0.input_schema.properties.a: the keyword 'uniqueItems'",
        ),
    ],
)
def test_what_is_refused_is_named(client: anthropic.Anthropic, options: Any, says: str) -> None:
    base: dict[str, Any] = {"messages": [USER], "model": "manta-demo", "max_tokens": 5}
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.messages.create(**base | options)
    body = message_answers.AnthropicError.model_validate(refused.value.body)
    assert body.error.type == "invalid_request_error" and says in body.error.message
    assert body.request_id == refused.value.request_id


def test_errors_have_anthropics_types(demo: LocalServer, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        ask(client, USER, model="claude")
    assert unknown.value.type == "not_found_error"
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        client.messages.batches.list()
    answer = httpx.post(f"{demo.url}/v1/messages", content=b"{", headers={"content-type": "a/b"})
    assert (answer.status_code, answer.json()["type"]) == (415, "error")
    assert httpx.get(f"{demo.url}/v1/messages").json()["error"]["type"] == "invalid_request_error"


def test_a_key_is_taken_as_anthropics_clients_send_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANTA_API_KEYS", "secret")
    with serve_locally(max_model_len=256, num_blocks=64) as server:
        url = server.url
        with anthropic.Anthropic(base_url=url, api_key="secret", max_retries=0) as client:
            assert ask(client, USER, max_tokens=1)
        with anthropic.Anthropic(base_url=url, auth_token="secret", max_retries=0) as client:
            assert ask(client, USER, max_tokens=1)
        with anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as client:
            with pytest.raises(anthropic.AuthenticationError) as refused:
                ask(client, USER)
            assert refused.value.type == "authentication_error"
