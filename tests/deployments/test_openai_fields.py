"""Every field that OpenAI documents, read from its own client's types: obeyed or refused by name.

What asks for nothing, as null, false, an empty list or a default, is taken for every one of them.
"""

import json
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types import chat, completion_create_params, responses, shared_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params, response_input_param
from openai.types.shared_params import response_format_json_schema
from pydantic import BaseModel, TypeAdapter, ValidationError

from deployments.api.response_store import ResponseStore
from deployments.api.schema.completion_request import CompletionRequest
from deployments.api.schema.protocol import ChatCompletionRequest, StreamOptions
from deployments.api.schema.responses.items import InputItem, InputPart
from deployments.api.schema.responses.request import ResponseRequest, TextOptions
from deployments.api.schema.responses.tools import CustomTool, FunctionTool, NamespaceTool
from deployments.api.schema.structured import NamedSchema
from deployments.api.schema.tools import NamedTool
from engine.speculation.costs import StepCosts
from engine.strict import explain
from engine.text.messages import Function, Message, RefusalPart, TextPart, Tool, ToolCall
from tests.deployments.local_server import LocalServer
from tests.ports.behaviours import table

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
    (responses.CustomToolParam, CustomTool, {"type": "custom", "name": "f"}),
    (
        responses.NamespaceToolParam,
        NamespaceTool,
        {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f"}]},
    ),
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
    item(
        responses.ResponseCustomToolCallParam,
        type="custom_tool_call",
        call_id="call_1",
        name="f",
        input="7",
    ),
    item(
        responses.ResponseCustomToolCallOutputParam,
        type="custom_tool_call_output",
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
        ("chat/completions", {"modalities": ["text", "audio"]}, "modalities"),
        ("chat/completions", {"web_search_options": {}}, "web_search_options"),
        ("chat/completions", {"functions": [{"name": "f"}]}, "functions"),
        ("completions", {"suffix": "end"}, "suffix"),
        ("responses", {"background": True}, "background"),
        ("responses", {"conversation": "conv_1"}, "conversation"),
        ("responses", {"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options"),
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


def test_what_codex_sends(demo: LocalServer) -> None:
    """Its tools in a namespace, one that takes any text, one that only OpenAI runs, and tags."""
    function = WEATHER | {"type": "function"}
    patch = {
        "type": "custom",
        "name": "apply_patch",
        "description": "Patches files.",
        "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
    }
    body: dict[str, Any] = {
        "input": [QUESTION],
        "store": False,
        "reasoning": {"effort": "none", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "client_metadata": {"session": "1"},
        "text": {"verbosity": "low"},
        "service_tier": "priority",
        "tools": [
            {"type": "namespace", "name": "mcp", "description": "Tools.", "tools": [function]},
            patch,
            {"type": "web_search", "external_web_access": True},
        ],
        "tool_choice": {"type": "function", "name": "get_weather", "namespace": "mcp"},
        "temperature": 0,
    }
    answer = httpx.post(f"{demo.url}/v1/responses", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-tools-left-out"] == "web_search"
    responses.Response.model_validate(answer.json())
    (call,) = answer.json()["output"]
    assert (call["name"], call["namespace"]) == ("get_weather", "mcp")
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "7"}
    again = body | {"input": [QUESTION, call, result], "tool_choice": "none"}
    assert httpx.post(f"{demo.url}/v1/responses", json=again, timeout=60).status_code == 200
    free = body | {"tool_choice": {"type": "custom", "name": "apply_patch"}, "stream": True}
    text = httpx.post(
        f"{demo.url}/v1/responses", json=free | {"max_output_tokens": 400}, timeout=60
    ).text
    events = [
        json.loads(line.removeprefix("data: "))
        for line in text.splitlines()
        if line.startswith("data: ")
    ]
    adapter: TypeAdapter[Any] = TypeAdapter(responses.ResponseStreamEvent)
    for event in events:
        adapter.validate_python(event)
    (done,) = [e for e in events if e["type"] == "response.custom_tool_call_input.done"]
    item = next(e["item"] for e in events if e["type"] == "response.output_item.done")
    assert (item["type"], item["name"], item["input"]) == (
        *("custom_tool_call", "apply_patch"),
        done["input"],
    )
    output = {"type": "custom_tool_call_output", "call_id": item["call_id"], "output": "done"}
    again = body | {"input": [QUESTION, item, output], "tool_choice": "none"}
    assert httpx.post(f"{demo.url}/v1/responses", json=again, timeout=60).status_code == 200


def test_a_choice_among_allowed_tools(demo: LocalServer) -> None:
    function = {"type": "function", **WEATHER}
    other = {"type": "function", "name": "other", "parameters": {"type": "object"}}
    choice = {
        "type": "allowed_tools",
        "mode": "required",
        "tools": [{k: function[k] for k in ("type", "name")}],
    }
    body = {"input": "hi", "tools": [function, other], "tool_choice": choice, "temperature": 0}
    answer = httpx.post(f"{demo.url}/v1/responses", json=body, timeout=60)
    assert [item["name"] for item in answer.json()["output"]] == ["get_weather"]
    choice["tools"] = [{"type": "function", "name": "missing"}]
    refused = httpx.post(f"{demo.url}/v1/responses", json=body, timeout=60).json()["error"]
    assert refused["param"] == "tool_choice" and "'missing'" in refused["message"]


def test_what_other_clients_add_to_history_is_not_in_the_way(demo: LocalServer) -> None:
    call = CALL | {"function": {"name": "f", "arguments": {"a": 1}}, "index": 0}
    extra: dict[str, Any] = {"provider_specific_fields": {"x": 1}, "id": "msg_1"}
    messages = [
        QUESTION | {"content": [TEXT_PART | {"cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": None, "reasoning": "So.", "tool_calls": [call], **extra},
        {"role": "tool", "tool_call_id": "call_1", "content": "7", "cache_control": None},
        {"role": "assistant", "content": None},
        {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "8"},
        QUESTION,
    ]
    same = [
        QUESTION | {"content": "hi"},
        {
            "role": "assistant",
            "reasoning_content": "So.",
            "tool_calls": [CALL | {"function": {"name": "f", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "7"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "tool_calls": [CALL | {"id": "f"}]},
        {"role": "tool", "tool_call_id": "f", "content": "8"},
        QUESTION,
    ]
    told = [
        httpx.post(f"{demo.url}/tokenize", json={"messages": said}).json()["tokens"]
        for said in (messages, same)
    ]
    assert told[0] == told[1]
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}]
    refused = httpx.post(f"{demo.url}/tokenize", json={"messages": image}).json()["error"]
    assert "images, audio and files are not read here" in refused["message"]


def test_a_response_goes_on_from_one_that_is_stored(demo: LocalServer) -> None:
    options: Any = {"model": "manta-demo", "temperature": 0, "max_output_tokens": 20}
    with demo.client() as client:
        first = client.responses.create(input="Repeat these words: sea", **options)
        second = client.responses.create(
            input="Repeat these words: river", previous_response_id=first.id, **options
        )
        whole = client.responses.create(
            input=[
                {"role": "user", "content": "Repeat these words: sea"},
                *(part.model_dump() for part in first.output),
                {"role": "user", "content": "Repeat these words: river"},
            ],  # type: ignore[misc]
            store=False,
            **options,
        )
        assert second.usage is not None and whole.usage is not None
        assert second.usage.input_tokens == whole.usage.input_tokens
        assert (second.output_text, second.previous_response_id) == (whole.output_text, first.id)
        assert client.responses.retrieve(second.id).output_text == second.output_text
        with pytest.raises(openai.BadRequestError, match="stream: "):
            client.responses.retrieve(second.id, stream=True)
        for gone in (whole.id, "resp_none"):
            with pytest.raises(openai.BadRequestError) as refused:
                client.responses.create(input="a", previous_response_id=gone, **options)
            assert refused.value.code == "previous_response_not_found"
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(first.id)


def test_what_is_stored_has_a_bound_and_an_owner() -> None:
    store = ResponseStore(max_characters=1000)
    said = [Message(role="user", content="a" * 280)]
    for i in range(5):
        store.put("ann", {"id": str(i)}, said)
    assert [store.get("ann", str(i)) is not None for i in range(5)] == [False] * 2 + [True] * 3
    assert store.get("bob", "4") is None
    store.put("ann", {"id": "large"}, [Message(role="user", content="a" * 2000)])
    store.put("ann", {"id": "tools", "tools": [{"type": "mcp", "server": "a" * 2000}]}, said)
    assert store.get("ann", "large") is store.get("ann", "tools") is None
    assert store.get("ann", "4") is not None


def test_thoughts_survive_clients_that_send_back_only_what_is_encrypted(demo: LocalServer) -> None:
    body: dict[str, Any] = {
        "input": [{"role": "user", "content": "What is 12 + 30?"}],
        "reasoning": {"effort": "high"},
        "include": ["reasoning.encrypted_content"],
        "temperature": 0,
    }
    answer = httpx.post(f"{demo.url}/v1/responses", json=body, timeout=60).json()
    thought, said = answer["output"]
    assert thought["content"][0]["text"] and answer["usage"]["output_tokens_details"]
    stripped = {k: v for k, v in thought.items() if k != "content"}
    foreign = stripped | {"encrypted_content": "gAAAA-of-somebody-else"}

    def tokens(item: dict[str, Any]) -> int:
        items = [*body["input"], item, said, QUESTION]
        again = httpx.post(f"{demo.url}/v1/responses", json=body | {"input": items}, timeout=60)
        return int(again.json()["usage"]["input_tokens"])

    assert tokens(stripped) == tokens(thought)
    assert tokens(foreign) <= tokens(thought)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_token_ids_are_told_where_asked_for(demo: LocalServer, path: str, stream: bool) -> None:
    """As those ask who train on what a model has sampled."""
    prompt: dict[str, Any] = (
        {"messages": [QUESTION]} if path.startswith("chat") else {"prompt": "Repeat: sea"}
    )
    wishes = {"return_token_ids": True, "return_tokens_as_token_ids": True, "stream": stream}
    body = prompt | wishes | {"temperature": 0, "max_tokens": 6, "logprobs": 1}
    if path.startswith("chat"):
        body |= {"logprobs": True}
    answer = httpx.post(f"{demo.url}/v1/{path}", json=body)
    chunks = (
        [answer.json()]
        if not stream
        else [
            json.loads(line.removeprefix("data: "))
            for line in answer.text.splitlines()
            if line.startswith("data: {")
        ]
    )
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    told = [token for choice in choices for token in choice.get("token_ids", ())]
    names = []
    for choice in choices:
        found = choice["logprobs"] or {}
        names += found.get("tokens", [entry["token"] for entry in found.get("content", ())])
    assert names == [f"token_id:{token}" for token in told] and 0 < len(told) <= 6
    (of_prompt,) = [
        part["prompt_token_ids"] for part in (*chunks, *choices) if "prompt_token_ids" in part
    ]
    counted = httpx.post(f"{demo.url}/tokenize", json=prompt).json()
    assert of_prompt == counted["tokens"]
    assert all(chunk["system_fingerprint"] == demo.front.fingerprint for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_effort_switches_thoughts_on_and_off_and_usage_counts_them(
    demo: LocalServer, stream: bool
) -> None:
    counts = {}
    for effort in ("none", "high"):
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": "What is 12 + 30?"}],
            "reasoning_effort": effort,
            "temperature": 0,
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        text = httpx.post(f"{demo.url}/v1/chat/completions", json=body).text
        last = text.strip().split("data: ")[-2] if stream else text
        usage = json.loads(last)["usage"]
        counts[effort] = usage["completion_tokens_details"]["reasoning_tokens"]
    assert counts["none"] == 0 < 3 < counts["high"] < usage["completion_tokens"]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prediction_changes_how_soon_an_answer_comes_and_nothing_else(
    demo: LocalServer, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert demo.engine.speculator is not None
    demo.engine.speculator.costs.forget()
    monkeypatch.setattr(StepCosts, "count", lambda *_: None)  # what is not known costs nothing
    words = "apple river stone window"
    answers = []
    for predicted in (None, words, "apple river tree house garden"):
        with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none") as client:
            answer: Any = client.chat.completions.create(
                model="manta-demo",
                messages=[{"role": "user", "content": f"Repeat these words: {words}"}],
                temperature=0,
                prediction={"type": "content", "content": predicted} if predicted else openai.omit,
                stream=stream,
                stream_options={"include_usage": True} if stream else openai.omit,
            )
            if stream:
                chunks = list(answer)
                said = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
                usage = chunks[-1].usage
            else:
                said, usage = answer.choices[0].message.content, answer.usage
        details = usage.completion_tokens_details
        counts = details.accepted_prediction_tokens, details.rejected_prediction_tokens
        answers.append((said, usage.completion_tokens, counts))
    (plain, num_plain, none), (said, num, right), (other, num_other, wrong) = answers
    assert plain == said == other == words
    assert num_plain == num == num_other
    assert none == (0, 0) and right[0] >= 3 and wrong[0] > 0 < wrong[1]


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


@pytest.mark.parametrize("stream", [False, True])
def test_a_thought_that_a_message_has_begun_goes_on_as_one(demo: LocalServer, stream: bool) -> None:
    """However long ago it has begun; and it is left out for whoever wants none."""
    thought = "<think>\n" + "Hm, apple river stone. " * 5
    body: dict[str, Any] = {
        "messages": [QUESTION, {"role": "assistant", "content": thought}],
        **{"continue_final_message": True, "add_generation_prompt": False},
        **{"max_tokens": 12, "ignore_eos": True, "temperature": 0, "stream": stream},
    }

    def told(**more: Any) -> tuple[str, str]:
        answer = httpx.post(f"{demo.url}/v1/chat/completions", json=body | more)
        if not stream:
            said = answer.json()["choices"][0]["message"]
            return said.get("reasoning", ""), said["content"]
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines()]
        chunks = [json.loads(line) for line in lines if line.startswith("{")]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        thoughts, contents = (
            "".join(delta.get(name) or "" for delta in deltas) for name in ("reasoning", "content")
        )
        return thoughts, contents

    reasoning, content = told()
    assert reasoning and told(include_reasoning=False) == ("", content)


def test_the_table_of_behaviours_is_the_one_that_is_asked() -> None:
    document = Path(__file__).resolve().parents[2] / "docs" / "api.md"
    assert table() in document.read_text()
