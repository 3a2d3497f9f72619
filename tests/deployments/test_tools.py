"""Tools and reasoning, asked for by the real `openai` client and used by the demo model."""

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion

from deployments.parsing import REASONING_FORMATS
from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer
from tests.deployments.scripted import ScriptedApi

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
    # Arguments come as they are made: behind the name, as many at once as drafts were right.
    assert not arguments[0] and arguments[-1]
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
        content, thought = "", ""
        for chunk in client.chat.completions.create(**THINK, stream=True):
            delta = chunk.choices[0].delta
            content += delta.content or ""
            more = getattr(delta, "reasoning_content", None) or ""
            assert not (more and content), "thoughts come first"
            thought += more
    assert (content, thought) == (message.content, reasoning)


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
            {"messages": [{"role": "user", "content": None}]},
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


# --- What a model says, word for word ---------------------------------------------------------

CALL = '<tool_call>\n{"name": "set_timer", "arguments": {"minutes": 3}}\n</tool_call>'
MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]


@pytest.fixture(params=[[], MARKS], ids=["text", "special"])
def scripted(tmp_path: Path, request: pytest.FixtureRequest) -> ScriptedApi:
    """Where the marks are text, and where they are special tokens, which texts are without."""
    return ScriptedApi(tmp_path, request.param, tool_parser="hermes", reasoning_parser="think")


def say(api: ScriptedApi, text: str, **options: Any) -> tuple[str, str, list[tuple[str, str]], str]:
    """(content, reasoning, calls, finish reason) of what the model says, whole and streamed."""
    api.says = text
    answers = []
    for stream in (False, True):
        choice = asyncio.run(api.chat(tools=[WEATHER, TIMER], stream=stream, **options))
        message = choice["message"]
        calls = [call["function"] for call in message.get("tool_calls", ())]
        answers.append(
            (
                message["content"] or "",
                message.get("reasoning_content", ""),
                [(call["name"], call["arguments"]) for call in calls],
                choice["finish_reason"],
            )
        )
    assert answers[0] == answers[1]
    return answers[0]


TIMER_CALL = ("set_timer", '{"minutes": 3}')


@pytest.mark.parametrize(
    ("text", "content", "reasoning", "calls"),
    [
        ("Hello.\n", "Hello.\n", "", []),
        (f"<think>\nHm.\n</think>\n\nYes.\n{CALL}", "Yes.", "Hm.", [TIMER_CALL]),
        (f"<think>\nHm.\n{CALL}", "", "Hm.", [TIMER_CALL]),
        (f"<tool_call>{CALL} 17 degrees", " 17 degrees", "", [TIMER_CALL]),
        (f"A <tool_call> is:\n\n{CALL}\n{CALL}", "A <tool_call> is:", "", [TIMER_CALL] * 2),
        ('<tool_call>{"name": "set_timer"}}</tool_call>', "", "", [("set_timer", "{}")]),
    ],
)
def test_an_answer_comes_apart_streamed_or_not_and_whatever_its_marks_are(
    scripted: ScriptedApi,
    text: str,
    content: str,
    reasoning: str,
    calls: list[tuple[str, str]],
) -> None:
    reason = "tool_calls" if calls else "stop"
    assert say(scripted, text) == (content, reasoning, calls, reason)


@pytest.mark.parametrize("are_special", [False, True], ids=["text", "special"])
@pytest.mark.parametrize("name", REASONING_FORMATS)
def test_thoughts_come_apart_in_every_format(tmp_path: Path, name: str, are_special: bool) -> None:
    """Also where nobody has offered tools, and the marks are no text."""
    format = REASONING_FORMATS[name]
    text = f"{format.open}Hm.{format.close}Yes."
    if format.has_channels:
        text = f"{format.open}Hm.{format.close}<|start|>assistant<|channel|>final<|message|>Yes."
    special = list(format.marks) if are_special else []
    api = ScriptedApi(tmp_path, special, reasoning_parser=name)
    api.says = text
    for stream in (False, True):
        message = asyncio.run(api.chat(stream=stream))["message"]
        assert (message["reasoning_content"].strip(), message["content"]) == ("Hm.", "Yes.")


def test_marks_that_nobody_looks_for_are_left_out_as_other_special_tokens_are(
    tmp_path: Path,
) -> None:
    api = ScriptedApi(tmp_path, MARKS, tool_parser="hermes", reasoning_parser="none")
    api.says = "<think>a<tool_call>b"
    assert asyncio.run(api.chat())["message"]["content"] == "ab"
    choice = asyncio.run(api.chat(tools=[TIMER]))
    assert choice["message"]["content"] == "a<tool_call>b"


def test_the_engine_stops_after_the_only_call_that_is_allowed(scripted: ScriptedApi) -> None:
    text = f"{CALL}\n{CALL} and so on" * 5
    for stream in (False, True):
        scripted.says = text
        choice = asyncio.run(scripted.chat(tools=[TIMER], parallel_tool_calls=False, stream=stream))
        assert choice["finish_reason"] == "tool_calls"
        assert len(choice["message"]["tool_calls"]) == 1
        assert scripted.num_made <= len(CALL)
        assert scripted.finish_reason == "stop"


@pytest.mark.parametrize(
    ("stop", "arguments", "ending"),
    [
        ("\n</tool", '{"minutes": 3}', "tool_calls"),
        ("}}", '{"minutes": 3', "stop"),
        ("minutes", '{"', "stop"),
        ("_timer", None, "stop"),
    ],
)
def test_a_call_that_a_stop_has_cut_is_not_to_be_carried_out(
    tmp_path: Path, stop: str, arguments: str | None, ending: str
) -> None:
    calls = [] if arguments is None else [("set_timer", arguments)]
    _, _, *found = say(ScriptedApi(tmp_path, [], tool_parser="hermes"), CALL, stop=[stop])
    assert found == [calls, ending]


@pytest.mark.parametrize(
    ("arguments", "ending"),
    [
        *(
            ("", "stop"),
            ('{"', "stop"),
            ('{"minutes": 3', "stop"),
            ('{"minutes": [{"a": "', "stop"),
        ),
        ('{"minutes": 3}', "tool_calls"),
        ('{"minutes": 3,}', "tool_calls"),  # whole, and for whoever carries it out to refuse
    ],
)
def test_a_call_in_which_the_output_ends_is_not_to_be_carried_out(
    tmp_path: Path, arguments: str, ending: str
) -> None:
    calls = [("set_timer", arguments)] if arguments else []
    text = f'<tool_call>{{"name": "set_timer", "arguments": {arguments}'
    _, _, *found = say(ScriptedApi(tmp_path, [], tool_parser="hermes"), text)
    assert found == [calls, ending]


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("arguments", ['{"', '{"minutes"', '{"minutes": 3'])
def test_a_call_that_max_tokens_has_cut_is_not_to_be_carried_out(
    tmp_path: Path, arguments: str, parallel: bool
) -> None:
    api = ScriptedApi(tmp_path, [], tool_parser="hermes")
    num_tokens = len(api.front.tokenizer.encode(CALL.rpartition(arguments)[0] + arguments))
    _, _, *found = say(api, CALL, max_tokens=num_tokens, parallel_tool_calls=parallel)
    assert found == [[("set_timer", arguments)], "length"]


def test_the_only_call_ends_at_the_same_token_where_steps_come_together(
    scripted: ScriptedApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.says = f"{CALL} and so on"
    options: dict[str, Any] = dict(tools=[TIMER], parallel_tool_calls=False, return_token_ids=True)
    alone = asyncio.run(scripted.chat(**options))
    monkeypatch.setattr(scripted, "is_ahead", True)
    together = asyncio.run(scripted.chat(**options))
    assert together["token_ids"] == alone["token_ids"]
    assert together["finish_reason"] == alone["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(("tokens", "calls"), [(1, []), (12, []), (40, [("set_timer", '{"min')])])
def test_a_forced_call_that_is_cut_says_nothing_else(
    scripted: ScriptedApi, tokens: int, calls: list[tuple[str, str]]
) -> None:
    choice = {"type": "function", "function": {"name": "set_timer"}}
    text = '{"name": "set_timer", "arguments": {"minutes": 3}}'
    found = say(scripted, text, tool_choice=choice, max_tokens=tokens)
    assert found == ("", "", calls, "length")
