"""Tools and reasoning, asked for by the real `openai` client and used by the demo model."""

import asyncio
import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city name"}},
            "required": ["city"],
        },
    },
}
TIMER = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "description": "Start a timer.",
        "parameters": {
            "type": "object",
            "properties": {"minutes": {"type": "integer", "description": "How many minutes"}},
            "required": ["minutes"],
        },
    },
}
ASK: dict[str, Any] = {
    "model": "manta-demo",
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "tools": [WEATHER, TIMER],
    "temperature": 0,
}
THINK: dict[str, Any] = {
    "model": "manta-demo",
    "messages": [{"role": "user", "content": "What is 12 + 30?"}],
    "temperature": 0,
    "extra_body": {"chat_template_kwargs": {"enable_thinking": True}},
}


def calls_of(answer: ChatCompletion) -> list[tuple[str, dict[str, Any]]]:
    return [
        (call.function.name, json.loads(call.function.arguments))
        for call in answer.choices[0].message.tool_calls or []
        if call.type == "function"
    ]


def test_a_tool_is_called_and_its_result_answered_from(demo: LocalServer) -> None:
    with demo.client() as client:
        answer = client.chat.completions.create(**ASK)
        assert calls_of(answer) == [("get_weather", {"city": "Paris"})]
        choice = answer.choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        assert choice.message.tool_calls is not None
        result = {
            "role": "tool",
            "tool_call_id": choice.message.tool_calls[0].id,
            "content": '{"temperature": 21, "condition": "sunny"}',
        }
        messages = [*ASK["messages"], choice.message, result]
        told = client.chat.completions.create(**ASK | {"messages": messages})
        assert told.choices[0].message.content == "It is 21 degrees and sunny in Paris."
        assert told.choices[0].finish_reason == "stop"


def test_a_streamed_call_comes_in_pieces_that_make_the_same(demo: LocalServer) -> None:
    with demo.client() as client:
        chunks = list(
            client.chat.completions.create(
                **ASK, stream=True, stream_options={"include_usage": True}
            )
        )
    parts = [call for c in chunks if c.choices for call in c.choices[0].delta.tool_calls or []]
    assert parts[0].id and parts[0].function and parts[0].function.name == "get_weather"
    arguments = [part.function.arguments or "" for part in parts if part.function]
    assert json.loads("".join(arguments)) == {"city": "Paris"}
    assert len([piece for piece in arguments if piece]) > 2, (
        "arguments should come as they are made"
    )
    assert not any(c.choices and c.choices[0].delta.content for c in chunks)
    assert chunks[-2].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].usage is not None


def test_the_clients_own_accumulator_takes_the_stream(demo: LocalServer) -> None:
    async def ask() -> ChatCompletion:
        async with demo.async_client() as client, client.chat.completions.stream(**ASK) as stream:
            async for _ in stream:
                pass
            return await stream.get_final_completion()

    assert calls_of(asyncio.run(ask())) == [("get_weather", {"city": "Paris"})]


def test_tool_choice_none_hides_the_tools(demo: LocalServer) -> None:
    with demo.client() as client:
        hidden = client.chat.completions.create(**ASK, tool_choice="none")
        bare = client.chat.completions.create(**{k: v for k, v in ASK.items() if k != "tools"})
        assert hidden.choices[0].message.tool_calls is None
        assert hidden.choices[0].message.content == bare.choices[0].message.content
        auto = client.chat.completions.create(**ASK, tool_choice="auto")
        assert calls_of(auto) == [("get_weather", {"city": "Paris"})]


@pytest.mark.parametrize("parallel", [True, False])
def test_two_calls_only_where_parallel_calls_are_allowed(demo: LocalServer, parallel: bool) -> None:
    question = "What is the weather in Paris and Oslo?"
    options = ASK | {
        "messages": [{"role": "user", "content": question}],
        "tools": [WEATHER],
        "parallel_tool_calls": parallel,
    }
    with demo.client() as client:
        answer = client.chat.completions.create(**options)
        assert [arguments["city"] for _, arguments in calls_of(answer)] == (
            ["Paris", "Oslo"] if parallel else ["Paris"]
        )
        indices = set()
        for chunk in client.chat.completions.create(**options, stream=True):
            indices |= {call.index for call in chunk.choices[0].delta.tool_calls or []}
        assert indices == ({0, 1} if parallel else {0})
        assert chunk.choices[0].finish_reason == "tool_calls"
    wait_until(demo.is_idle)


def test_reasoning_is_apart_from_the_answer(demo: LocalServer) -> None:
    with demo.client() as client:
        message = client.chat.completions.create(**THINK).choices[0].message
        assert message.content is not None and "42" in message.content
        assert "think" not in message.content
        reasoning = message.reasoning_content  # type: ignore[attr-defined]
        assert reasoning and "<" not in reasoning
        content, thought, order = "", "", []
        for chunk in client.chat.completions.create(**THINK, stream=True):
            delta = chunk.choices[0].delta
            content += delta.content or ""
            more = getattr(delta, "reasoning_content", None) or ""
            thought += more
            order.append(bool(more))
    assert (content, thought) == (message.content, reasoning)
    assert order.index(True) < len(order) - 1 - order[::-1].index(True), "it should be streamed"


def test_an_answer_without_a_thought_has_no_reasoning(demo: LocalServer) -> None:
    with demo.client() as client:
        message = (
            client.chat.completions.create(**{k: v for k, v in THINK.items() if k != "extra_body"})
            .choices[0]
            .message
        )
    assert not hasattr(message, "reasoning_content")


@pytest.mark.parametrize(
    ("change", "param", "says"),
    [
        ({"tool_choice": "required", "tools": []}, "tool_choice", "no tools to choose from"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "fly"}}},
            "tool_choice",
            "'fly' is not among the tools",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools.0.function.name",
            "",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages.0.tool_call_id",
            "tool_call_id: messages of a tool need it",
        ),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "messages.0.content",
            "required",
        ),
        (
            {"extra_body": {"chat_template_kwargs": {"messages": 1}}},
            "chat_template_kwargs",
            "'mess",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    demo: LocalServer, change: dict[str, Any], param: str | None, says: str
) -> None:
    with demo.client() as client, pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASK | change)
    assert says in refused.value.message
    assert refused.value.param == param


def test_a_model_without_tools_says_so(tiny: LocalServer) -> None:
    with tiny.client() as client, pytest.raises(openai.BadRequestError, match="tool_parser"):
        client.chat.completions.create(**ASK | {"model": "tiny"})
