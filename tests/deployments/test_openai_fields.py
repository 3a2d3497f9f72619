"""Every field that OpenAI documents, read from its own client's types: obeyed or refused by name.

What asks for nothing, as null, false, an empty list or a default, is taken for every one of them.
"""

import typing
from collections.abc import Iterable, Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import chat, completion_create_params, responses, shared_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params, response_input_param
from openai.types.shared_params import response_format_json_schema
from pydantic import BaseModel, TypeAdapter, ValidationError

from deployments.api.routes.responses import FunctionTool, ResponseRequest, TextOptions
from deployments.api.schema.protocol import ChatCompletionRequest, CompletionRequest, StreamOptions
from deployments.api.schema.response_items import InputItem, InputPart
from deployments.api.schema.structured import NamedSchema
from deployments.api.schema.tools import NamedTool
from engine.strict import explain
from engine.text.messages import Function, Message, RefusalPart, TextPart, Tool, ToolCall
from tests.deployments.local_server import LocalServer

TEXT_PART = {"type": "text", "text": "hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def item(params: type, **fields: Any) -> tuple[type, Any, dict[str, Any]]:
    return params, InputItem, fields


def message(params: type, **fields: Any) -> tuple[type, Any, dict[str, Any]]:
    return params, Message, fields


ENDPOINTS: list[tuple[type, Any, dict[str, Any]]] = [
    (
        chat_create_params.CompletionCreateParamsStreaming,
        ChatCompletionRequest,
        {"messages": [{"role": "user", "content": "hi"}]},
    ),
    (
        completion_create_params.CompletionCreateParamsStreaming,
        CompletionRequest,
        {"prompt": "hi"},
    ),
    (response_create_params.ResponseCreateParamsStreaming, ResponseRequest, {"input": "hi"}),
]
PARTS: list[tuple[type, Any, dict[str, Any]]] = [
    message(chat.ChatCompletionSystemMessageParam, role="system", content="hi"),
    message(chat.ChatCompletionDeveloperMessageParam, role="developer", content="hi"),
    message(chat.ChatCompletionUserMessageParam, role="user", content="hi"),
    message(chat.ChatCompletionAssistantMessageParam, role="assistant", content="hi"),
    message(chat.ChatCompletionToolMessageParam, role="tool", content="hi", tool_call_id="call_1"),
    (chat.ChatCompletionMessageFunctionToolCallParam, ToolCall, CALL),
    (chat.ChatCompletionContentPartTextParam, TextPart, TEXT_PART),
    (chat.ChatCompletionContentPartRefusalParam, RefusalPart, {"type": "refusal", "refusal": "a"}),
    (chat.ChatCompletionNamedToolChoiceParam, NamedTool, {"function": {"name": "f"}}),
    (chat.ChatCompletionFunctionToolParam, Tool, {"type": "function", "function": {"name": "f"}}),
    (chat.ChatCompletionStreamOptionsParam, StreamOptions, {}),
    (shared_params.FunctionDefinition, Function, {"name": "f"}),
    (response_format_json_schema.JSONSchema, NamedSchema, {"name": "x"}),
    (responses.ResponseInputTextParam, InputPart, {"type": "input_text", "text": "hi"}),
    (
        responses.ResponseOutputTextParam,
        InputPart,
        {"type": "output_text", "text": "hi", "annotations": []},
    ),
    (responses.FunctionToolParam, FunctionTool, {"type": "function", "name": "f"}),
    (responses.ResponseTextConfigParam, TextOptions, {}),
    item(responses.EasyInputMessageParam, role="user", content="hi"),
    item(response_input_param.Message, role="user", content=[{"type": "input_text", "text": "a"}]),
    item(
        responses.ResponseOutputMessageParam,
        type="message",
        role="assistant",
        id="msg_1",
        status="completed",
        content=[{"type": "output_text", "text": "hi", "annotations": []}],
    ),
    item(
        responses.ResponseFunctionToolCallParam,
        type="function_call",
        call_id="call_1",
        name="f",
        arguments="{}",
    ),
    item(
        response_input_param.FunctionCallOutput,
        type="function_call_output",
        call_id="call_1",
        output="7",
    ),
    item(responses.ResponseReasoningItemParam, type="reasoning", id="rs_1", summary=[]),
]
ALL = ENDPOINTS + PARTS
# What OpenAI's documentation calls the default of a field that we do not have.
DEFAULTS: list[tuple[Any, dict[str, Any]]] = [
    (ChatCompletionRequest, {"service_tier": "auto"}),
    (ChatCompletionRequest, {"service_tier": "default"}),
    (ChatCompletionRequest, {"modalities": ["text"]}),
    (ChatCompletionRequest, {"function_call": "none"}),
    (ChatCompletionRequest, {"verbosity": "medium"}),
    (ChatCompletionRequest, {"tool_choice": "auto"}),
    (ChatCompletionRequest, {"parallel_tool_calls": True}),
    (ChatCompletionRequest, {"top_logprobs": 0}),
    (ChatCompletionRequest, {"stream_options": {"include_obfuscation": False}}),
    (ChatCompletionRequest, {"prompt_cache_options": {"mode": "implicit"}}),
    (ChatCompletionRequest, {"prompt_cache_retention": "in_memory"}),
    (ResponseRequest, {"service_tier": "auto"}),
    (ResponseRequest, {"truncation": "disabled"}),
    (ResponseRequest, {"background": False, "store": False, "include": []}),
    (ResponseRequest, {"reasoning": {"effort": None, "summary": None}}),
    (ResponseRequest, {"text": {"format": {"type": "text"}, "verbosity": "medium"}}),
    (ResponseRequest, {"stream_options": {"include_obfuscation": False}}),
    (ResponseRequest, {"top_logprobs": 0}),
    (ResponseRequest, {"tool_choice": "auto", "tools": []}),
]
BY_TYPE = pytest.mark.parametrize(
    ("params", "model", "minimal"), ALL, ids=[params.__name__ for params, _, _ in ALL]
)


def faults(model: Any, body: dict[str, Any]) -> list[tuple[str, str]]:
    try:
        TypeAdapter(model).validate_python(body)
    except ValidationError as error:
        return explain(error.errors())
    return []


def types_in(hint: Any) -> Iterator[Any]:
    """What a hint is made of: origins of generics, literals' values, plain types."""
    origin = typing.get_origin(hint)
    if origin is None:
        yield hint
    elif origin is typing.Literal:
        yield from typing.get_args(hint)
    elif origin in (typing.Union, typing.Annotated):
        for inner in typing.get_args(hint):
            yield from types_in(inner)
    else:
        yield origin


def is_list(kind: Any) -> bool:
    return (
        isinstance(kind, type) and issubclass(kind, Iterable) and not issubclass(kind, dict | str)
    )


def values_of(hint: Any) -> Iterator[Any]:
    """Some of a documented type."""
    for kind in types_in(hint):
        if kind is bool:
            yield from (True, False)
        elif kind is str:
            yield "something"
        elif kind in (int, float):
            yield 2
        elif not isinstance(kind, type):
            yield kind
        elif issubclass(kind, dict):
            yield {"type": "something"}
        elif is_list(kind):
            yield ["something"]


@BY_TYPE
def test_what_asks_for_nothing_is_taken(params: type, model: Any, minimal: dict[str, Any]) -> None:
    refused = {}
    for name, hint in typing.get_type_hints(params).items():
        if name not in minimal:
            kinds = list(types_in(hint))
            asked: list[Any] = [None]
            asked += [False] * (bool in kinds) + [[]] * any(map(is_list, kinds))
            for value in asked:
                if found := faults(model, minimal | {name: value}):
                    refused[name, str(value)] = found
    assert not refused


@BY_TYPE
def test_what_asks_for_something_is_obeyed_or_refused_by_name(
    params: type, model: Any, minimal: dict[str, Any]
) -> None:
    for name, hint in typing.get_type_hints(params).items():
        for value in values_of(hint):
            for field, fault in faults(model, minimal | {name: value}):
                assert name in (field or fault), f"{name}={value}: {field}: {fault}"
                assert "unknown field" not in fault or field != name, field


@pytest.mark.parametrize(("model", "fields"), DEFAULTS)
def test_defaults_are_taken(model: Any, fields: dict[str, Any]) -> None:
    (minimal,) = [minimal for _, other, minimal in ENDPOINTS if other is model]
    assert not faults(model, minimal | fields)


def test_false_is_no_number_of_logprobs() -> None:
    assert CompletionRequest.model_validate({"prompt": "a", "logprobs": False}).logprobs is None


@pytest.mark.parametrize("model, fields", [(model, fields) for _, model, fields in ENDPOINTS])
def test_what_openai_does_not_document_is_refused_though_it_is_null(
    model: Any, fields: dict[str, Any]
) -> None:
    ((field, fault),) = faults(model, fields | {"max_tokenz": None})
    assert field == "max_tokenz" and "unknown field" in fault


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", {"service_tier": "flex"}, "service_tier"),
        ("chat/completions", {"store": True}, "store"),
        ("chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {"reasoning_effort": "low"}, "reasoning_effort"),
        ("chat/completions", {"web_search_options": {}}, "web_search_options"),
        ("chat/completions", {"functions": [{"name": "f"}]}, "functions"),
        ("completions", {"suffix": "end"}, "suffix"),
        ("responses", {"include": ["reasoning.encrypted_content"]}, "include"),
        ("responses", {"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options"),
        ("responses", {"text": {"verbosity": "low"}}, "text.verbosity"),
    ],
)
def test_what_we_lack_is_refused_by_name(
    demo: LocalServer, path: str, body: dict[str, Any], param: str
) -> None:
    (minimal,) = [m for _, model, m in ENDPOINTS if model.__name__ == MODELS[path]]
    answer = httpx.post(f"{demo.url}/v1/{path}", json=minimal | body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param and "not supported here" in error["message"]


MODELS = {
    "chat/completions": "ChatCompletionRequest",
    "completions": "CompletionRequest",
    "responses": "ResponseRequest",
}


# What clients send back


WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
QUESTION: Any = {"role": "user", "content": "What is the weather in Paris?"}


def test_a_parsed_answer_goes_back_as_it_came(demo: LocalServer) -> None:
    """OpenAI's client adds what it has parsed to what it was told."""
    options: Any = {"model": "manta-demo", "temperature": 0}
    tools: Any = [{"type": "function", "function": WEATHER}]
    with demo.client() as client:
        answer = client.chat.completions.parse(messages=[QUESTION], tools=tools, **options)
        asked = answer.choices[0].message
        (call,) = asked.tool_calls or []
        assert call.function.parsed_arguments == {"city": "Paris"}
        result: Any = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 7}'}
        told = client.chat.completions.create(
            messages=[QUESTION, asked, result],  # type: ignore[list-item]
            tools=tools,
            **options,
        )
        assert told.choices[0].message.content

        class Place(BaseModel):
            city: str

        response = client.responses.parse(input=[QUESTION], text_format=Place, **options)
        again = [QUESTION, *(part.model_dump() for part in response.output), QUESTION]
        assert client.responses.create(input=again, **options).output_text


def test_a_streams_deltas_go_back_as_they_came(demo: LocalServer) -> None:
    """With the index that each of their calls has."""
    tools: Any = [{"type": "function", "function": WEATHER}]
    with demo.client() as client:
        chunks = client.chat.completions.create(
            model="manta-demo", messages=[QUESTION], tools=tools, temperature=0, stream=True
        )
        parts = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
        call = parts[0].model_dump()
        call["function"]["arguments"] = "".join(
            part.function.arguments or "" for part in parts if part.function
        )
        assert call["index"] == 0
        messages: Any = [
            QUESTION,
            {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
            {"role": "tool", "tool_call_id": call["id"], "content": [TEXT_PART]},
        ]
        told = client.chat.completions.create(
            model="manta-demo", messages=messages, tools=tools, max_tokens=2
        )
    assert told.choices[0].message.content


def test_what_an_agent_sends_with_every_request(demo: LocalServer) -> None:
    """All fields that it knows, most of which ask for nothing."""
    body = {
        "model": "manta-demo",
        "instructions": "You are an agent.",
        "input": [
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": QUESTION["content"]}],
            }
        ],
        "tools": [WEATHER | {"type": "function", "strict": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": None,
        "store": False,
        "stream": False,
        "include": [],
        "service_tier": None,
        "prompt_cache_key": "0198-4f",
        "previous_response_id": None,
        "text": None,
    }
    answer = httpx.post(f"{demo.url}/v1/responses", json=body | {"temperature": 0})
    assert answer.status_code == 200, answer.text
    (tool,) = answer.json()["tools"]
    assert tool == WEATHER | {"type": "function", "strict": False, "description": None}


def test_refusals_thoughts_and_lists_of_parts_are_text_of_the_conversation(
    demo: LocalServer,
) -> None:
    """What another server's model said reaches the template as what it is: text."""

    def prompt_of(**body: Any) -> int:
        answer = httpx.post(f"{demo.url}/v1/responses", json={"max_output_tokens": 1} | body)
        assert answer.status_code == 200, answer.text
        return int(answer.json()["usage"]["input_tokens"])

    def tokens_of(*messages: dict[str, Any]) -> int:
        answer = httpx.post(f"{demo.url}/tokenize", json={"messages": [QUESTION, *messages]})
        return int(answer.json()["count"])

    refusal = {"type": "refusal", "refusal": "I cannot."}
    said = {"role": "assistant", "content": "I cannot."}
    assert prompt_of(input=[QUESTION, {"role": "assistant", "content": [refusal]}]) == tokens_of(
        said
    )
    assert tokens_of({"role": "assistant", "content": [refusal]}) == tokens_of(said)
    assert tokens_of({"role": "assistant", "refusal": "I cannot."}) == tokens_of(said)
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    parts = [{"type": "input_text", "text": "7"}, {"type": "input_text", "text": "degrees"}]
    result = {"type": "function_call_output", "call_id": "c", "output": parts}
    assert prompt_of(input=[QUESTION, call, result]) == tokens_of(
        {"role": "assistant", "tool_calls": [CALL | {"id": "c"}]},
        {"role": "tool", "tool_call_id": "c", "content": "7\ndegrees"},
    )
    summary = [{"type": "summary_text", "text": "Paris."}, {"type": "summary_text", "text": "Now."}]
    thought = {"type": "reasoning", "id": "rs_1", "summary": summary, "encrypted_content": None}
    answer = {"role": "assistant", "content": "7"}
    assert prompt_of(input=[QUESTION, thought, answer]) == tokens_of(
        answer | {"reasoning_content": "Paris.\n\nNow."}
    )


def test_tags_change_nothing_and_metadata_comes_back(demo: LocalServer) -> None:
    tags: Any = {"user": "u", "safety_identifier": "s", "prompt_cache_key": "k", "store": False}
    with demo.client() as client:
        bare = client.responses.create(model="manta-demo", input="a", temperature=0)
        tagged = client.responses.create(
            model="manta-demo", input="a", temperature=0, metadata={"run": "7"}, **tags
        )
        assert tagged.output_text == bare.output_text and tagged.metadata == {"run": "7"}
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                model="manta-demo", messages=[QUESTION], metadata={"k" * 65: "v"}
            )
    assert refused.value.param is not None and refused.value.param.startswith("metadata")
