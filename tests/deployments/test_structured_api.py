"""Structured output and forced tool calls over HTTP, with the real `openai` client.

The model is random and samples at temperature 1: what is right about its answers is the grammar's.
"""

import asyncio
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import xgrammar
from tokenizers import Tokenizer

from deployments.api.schema.tools import call_grammar
from deployments.parsing import FORMATS
from engine.sampling.grammar.worker import compile_grammar, tokenizer_info
from engine.structured_outputs import StructuredOutputs
from engine.text.messages import Tool
from tests.checkpoints import VOCAB_SIZE
from tests.deployments.in_process import InProcessApi, serve_in_process
from tests.engine.mcp_tools import MCP_TOOLS
from tests.engine.random_schemas import random_schema

PROMPT = "the cat sat"
MESSAGES: list[Any] = [{"role": "user", "content": PROMPT}]
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)
SERVER: dict[str, Any] = dict(num_blocks=1500, max_num_seqs=64)
TAG = {"type": "structural_tag", "format": {"type": "const_string", "value": "hi"}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"enum": [1, 2, 3]}},
    "required": ["age"],
}


@pytest.fixture(scope="module")
def model(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "chat"
    shutil.copytree(byte_model, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def api(model: Path) -> Iterator[InProcessApi]:
    with serve_in_process(str(model), tool_parser="hermes", **SERVER) as api:
        yield api
        api.assert_idle()


async def complete(api: InProcessApi, **options: Any) -> str:
    """The text of a completion, whole or streamed; it must have ended by itself."""
    options = dict(temperature=1.0, max_tokens=1500, prompt=PROMPT) | options
    answer = await api.openai.completions.create(model=api.front.model_name, **options)
    choices = [c.choices[0] async for c in answer] if options.get("stream") else answer.choices
    assert choices[-1].finish_reason == ("length" if "ignore_eos" in str(options) else "stop")
    return "".join(choice.text for choice in choices)


async def chat(api: InProcessApi, **options: Any) -> str:
    """The content of an answer, whole or streamed."""
    options = dict(temperature=1.0, messages=MESSAGES) | options
    answer = await api.openai.chat.completions.create(model=api.front.model_name, **options)
    if not options.get("stream"):
        return str(answer.choices[0].message.content)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in answer])


async def ask_for_instance(api: InProcessApi, number: int) -> str:
    """Of random schema `number`, in one of the ways to ask for it."""
    schema, stream = random_schema(number), number % 2 == 1
    if number % 4 < 2:
        named = {"name": "thing", "schema": schema, "strict": True}
        response_format = {"type": "json_schema", "json_schema": named}
        return await chat(api, seed=number, stream=stream, response_format=response_format)
    form: dict[str, Any] = {"guided_json": schema}
    if number % 8 < 4:
        form = {"structured_outputs": {"json": schema, "disable_any_whitespace": True}}
    return await complete(api, seed=number, stream=stream, extra_body=form)


@pytest.mark.parametrize(
    "batch", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))]
)
def test_200_of_200_random_schemas_are_obeyed(api: InProcessApi, batch: int) -> None:
    """In batches together with requests of no form, whose text is what it is alone."""
    numbers = range(50 * batch, 50 * batch + 50)
    plain = dict(seed=1, max_tokens=200, extra_body={"ignore_eos": True})
    alone = api.run(complete(api, **plain))

    async def ask() -> list[str]:
        others = [complete(api, **plain, stream=i % 2 == 1) for i in range(4)]
        return await asyncio.gather(*[ask_for_instance(api, n) for n in numbers], *others)

    *instances, one, two, three, four = api.run(ask())
    assert one == two == three == four == alone
    valid = 0
    for number, text in zip(numbers, instances, strict=True):
        jsonschema.validate(json.loads(text), random_schema(number))
        valid += 1
    assert valid == 50


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("form", "regex"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}é"}}, "[ab]{3}é"),
        ({"guided_regex": "[ab]{3}é"}, "[ab]{3}é"),
        ({"structured_outputs": {"choice": ["left", "right"]}}, "left|right"),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"structured_outputs": {"grammar": 'root ::= "x"{2,4} "!"'}}, "x{2,4}!"),
        ({"guided_grammar": 'root ::= "x"{2,4} "!"'}, "x{2,4}!"),
        ({"response_format": TAG}, "hi"),
        ({"structured_outputs": {"structural_tag": TAG}}, "hi"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_other_forms(api: InProcessApi, form: dict[str, Any], regex: str, stream: bool) -> None:
    ways = [complete(api, seed=i, stream=stream, extra_body=form) for i in range(4)]
    ways += [chat(api, seed=i, stream=stream, extra_body=form) for i in range(4)]

    async def ask() -> list[str]:
        return await asyncio.gather(*ways)

    for text in api.run(ask()):
        assert re.fullmatch(regex, text), text


def test_json_of_any_kind_and_text(api: InProcessApi) -> None:
    whole = api.run(
        chat(api, seed=4, max_tokens=30, response_format={"type": "json_object"}, stream=True)
    )
    assert whole.startswith("{")
    free = api.run(chat(api, seed=4, max_tokens=30, response_format={"type": "text"}))
    assert free == api.run(chat(api, seed=4, max_tokens=30))
    assert free != whole


def test_all_of_n_choices_have_the_form(api: InProcessApi) -> None:
    answer = api.run(
        api.openai.chat.completions.create(
            model=api.front.model_name,
            messages=MESSAGES,
            n=3,
            seed=5,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "person", "schema": SCHEMA},
            },
        )
    )
    texts = [choice.message.content or "" for choice in answer.choices]
    assert len(set(texts)) == 3
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_the_responses_api_has_forms_too(api: InProcessApi) -> None:
    form: Any = {"type": "json_schema", "name": "person", "schema": SCHEMA, "strict": True}

    def respond(**options: Any) -> Any:
        return api.run(
            api.openai.responses.create(
                model=api.front.model_name, input=PROMPT, store=False, **options
            )
        )

    answer = respond(text={"format": form})
    jsonschema.validate(json.loads(answer.output_text), SCHEMA)
    assert answer.text.format.name == "person"
    with pytest.raises(openai.BadRequestError, match="'not'"):
        respond(text={"format": form | {"schema": {"not": {}}}})
    not_closed = form | {"schema": {"type": "string", "pattern": "(a"}}
    with pytest.raises(openai.BadRequestError, match="parenthesis is not closed"):
        respond(text={"format": not_closed})
    with pytest.raises(openai.BadRequestError, match="is not closed"):  # before the first byte
        respond(text={"format": not_closed}, stream=True)


def test_an_answer_of_a_form_is_neither_a_thought_nor_a_call(model: Path, tmp_path: Path) -> None:
    """Though the template opens a think block, and the text could be read as a call."""
    thinker = tmp_path / "thinker"
    shutil.copytree(model, thinker)
    (thinker / "chat_template.jinja").write_text(TEMPLATE + "<think>")
    text = '{"name": "away", "parameters": {}}'
    options: dict[str, Any] = {"extra_body": {"guided_choice": [text]}}
    parsers = dict(tool_parser="llama3_json", reasoning_parser="think")
    with serve_in_process(str(thinker), **parsers, **SERVER) as api:
        assert api.run(chat(api, **options)) == text
        assert api.run(chat(api, **options, stream=True)) == text
        answer = api.run(
            api.openai.chat.completions.create(
                model=api.front.model_name, messages=MESSAGES, **options
            )
        )
    assert not answer.choices[0].message.tool_calls
    prompt = api.front.tokenizer.encode(PROMPT + "<think>\n</think>\n\n")
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"response_format": schema_format({"type": "thing"})},
            "response_format: type: 'thing' is no",
        ),
        ({"response_format": schema_format({"not": {}})}, "response_format: .*'not'"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        ({"extra_body": {"guided_regex": "(a"}}, "parenthesis is not closed"),
        ({"extra_body": {"guided_regex": "a" * 200_000}}, "guided_regex: .* too many"),
        ({"extra_body": {"guided_regex": "a", "guided_choice": ["b"]}}, "not beside guided_regex"),
        (
            {"extra_body": {"guided_regex": "a", "structured_outputs": {"regex": "a"}}},
            "structured_outputs: not beside guided_regex",
        ),
        ({"extra_body": {"structured_outputs": {}}}, "exactly one of"),
        ({"extra_body": {"structured_outputs": {"regexp": "a"}}}, "regexp"),
        ({"extra_body": {"structured_outputs": {"grammar": "root"}}}, "structured_outputs"),
        ({"extra_body": {"guided_regex": "a", "ignore_eos": True}}, "ignore_eos"),
    ],
)
def test_bad_forms_are_refused_at_the_door(
    api: InProcessApi, options: dict[str, Any], says: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        api.run(chat(api, stream=stream, **options))
    assert re.search(says, refused.value.message), refused.value.message


def test_nesting_without_end_is_refused(api: InProcessApi) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(70):
        schema = {"type": "array", "items": schema}
    with pytest.raises(openai.BadRequestError, match="nested too deeply"):
        api.run(chat(api, response_format=schema_format(schema)))
    deep = '{"type":"array","items":' * 20_000 + "{}" + "}" * 20_000
    body = f'{{"messages":[{{"role":"user","content":"a"}}],"guided_json":{deep}}}'
    answer = api.run(
        api.http.post(
            "/v1/chat/completions",
            content=body,
            headers={"Content-Type": "application/json"},
        )
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


# --- Forced tool calls ------------------------------------------------------------------------

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "minLength": 1, "maxLength": 6},
                    "unit": {"$ref": "#/$defs/unit"},
                },
                "required": ["city"],
                "$defs": {"unit": {"enum": ["C", "F"]}},
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "set_timer",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"minutes": {"type": "integer", "minimum": 1, "maximum": 90}},
                "required": ["minutes"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]
PARAMETERS = {
    tool["function"]["name"]: tool["function"].get(
        "parameters", {"type": "object", "maxProperties": 0}
    )
    for tool in TOOLS
}


async def call(api: InProcessApi, seed: int, choice: Any, **more: Any) -> tuple[str, str]:
    """(name, arguments) of the one call that an answer must be; streamed if the seed is odd."""
    options: dict[str, Any] = dict(
        model=api.front.model_name,
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice=choice,
        temperature=1.0,
        seed=seed,
        **more,
    )
    if seed % 2 == 0:
        answer = await api.openai.chat.completions.create(**options)
    else:
        async with api.openai.chat.completions.stream(**options) as stream:
            async for _ in stream:
                pass
            answer = await stream.get_final_completion()
    (one,) = answer.choices
    assert one.finish_reason == "tool_calls" and not one.message.content
    (made,) = one.message.tool_calls or []
    assert made.type == "function"
    return made.function.name, made.function.arguments


@pytest.mark.parametrize("parser", FORMATS)
def test_all_forced_calls_parse(
    api: InProcessApi, parser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.front, "tool_format", FORMATS[parser])
    choices = [
        *("required", "required"),
        {"type": "function", "function": {"name": "set_timer"}},
        {"type": "function", "function": {"name": "stop"}},
    ]

    async def ask() -> list[tuple[str, str]]:
        return await asyncio.gather(*[call(api, i, choices[i // 2]) for i in range(8)])

    calls = api.run(ask())
    for i, (name, arguments) in enumerate(calls):
        choice = choices[i // 2]
        if not isinstance(choice, str):
            assert name == choice["function"]["name"]
        jsonschema.validate(json.loads(arguments), PARAMETERS[name])
    assert {name for name, _ in calls} == set(PARAMETERS)


def test_a_forced_call_beside_a_form_is_a_call(api: InProcessApi) -> None:
    name, arguments = api.run(call(api, 0, "required", response_format={"type": "json_object"}))
    jsonschema.validate(json.loads(arguments), PARAMETERS[name])


@pytest.fixture(scope="module", params=["text", "special"])
def marked_api(model: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> Any:
    """Where the marks of calls are text, and where they are special tokens, which have none."""
    directory = tmp_path_factory.mktemp("marked") / "chat"
    shutil.copytree(model, directory)
    if request.param == "special":
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.add_special_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])
        tokenizer.save(str(directory / "tokenizer.json"))
    with serve_in_process(str(directory), tool_parser="hermes", **SERVER) as api:
        yield api
        api.assert_idle()


def test_beside_tools_a_form_binds_the_answer_alone(marked_api: InProcessApi) -> None:
    """A model that knows nothing calls one, or answers in the form: both, over some seeds."""
    options: dict[str, Any] = dict(
        model=marked_api.front.model_name,
        messages=MESSAGES,
        tools=TOOLS,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        max_tokens=100,
    )

    async def ask() -> list[Any]:
        create = marked_api.openai.chat.completions.create
        asked = [
            create(**options, seed=seed, parallel_tool_calls=seed % 2 > 0) for seed in range(16)
        ]
        return await asyncio.gather(*asked)

    kinds = set()
    for seed, answer in enumerate(marked_api.run(ask())):
        (choice,) = answer.choices
        calls = choice.message.tool_calls or []
        kinds.add(bool(calls))
        if not calls and choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content), SCHEMA)
        assert seed % 2 or len(calls) <= 1
        if choice.finish_reason != "length":  # which may cut a call, and leave its beginning
            assert not (calls and choice.message.content)
        for made in calls[: None if choice.finish_reason == "tool_calls" else -1]:
            schema = PARAMETERS[made.function.name]
            if made.function.name == "set_timer":  # which is strict
                jsonschema.validate(json.loads(made.function.arguments), schema)
    assert kinds == {True, False}


def test_a_strict_call_among_text(marked_api: InProcessApi) -> None:
    """Whatever precedes it; once begun, a call has a name of the list, and what that takes."""
    grammar = call_grammar(marked_api.front, FORMATS["hermes"], [Tool(**tool) for tool in TOOLS])
    thoughts = marked_api.front.special_tokens(("<think>", "</think>")).values()
    wanted = StructuredOutputs(**grammar.among_text(is_single=False, thoughts=list(thoughts)))
    tokenizer = marked_api.front.tokenizer
    info = tokenizer_info(marked_api.front.model, VOCAB_SIZE, [2])
    compiled = compile_grammar(xgrammar.GrammarCompiler(info), wanted)

    def takes(text: str) -> bool:
        matcher = xgrammar.GrammarMatcher(compiled)
        return all(map(matcher.accept_token, tokenizer.encode(text)))

    strict = '<tool_call>\n{"name": "set_timer", "arguments": {"minutes": %s}}\n</tool_call>'
    free = '<tool_call>\n{"name": "get_weather", "arguments": {"town": 1}}\n</tool_call>'
    assert takes("Hm <b>, so: " + strict % 3 + " and " + free + strict % 90 + " done")
    assert takes("<think>So</think>" + strict % 3) and takes("So</think>" + strict % 3)
    assert not takes(strict % 91)
    assert not takes(free.replace("get_weather", "get_weather_in"))
    assert not takes("<tool_call>\nwhat")


def test_tools_may_have_a_template_of_their_own(model: Path, tmp_path: Path) -> None:
    """It is the one that shows how calls are written."""
    directory = tmp_path / "chat"
    shutil.copytree(model, directory)
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (directory / "additional_chat_templates").mkdir()
    own = directory / "additional_chat_templates" / "tool_use.jinja"
    own.write_text("{{ tools[0].function.name }}{{ messages[0].content }}{# <tool_call> #}")
    with serve_in_process(str(directory), **SERVER) as api:
        name, arguments = api.run(call(api, 0, "required"))
        prompts = [
            api.post("/tokenize", messages=MESSAGES, tools=tools).json() for tools in ([], TOOLS)
        ]
    jsonschema.validate(json.loads(arguments), PARAMETERS[name])
    texts = [api.front.tokenizer.decode(prompt["tokens"]) for prompt in prompts]
    assert texts == [PROMPT, TOOLS[0]["function"]["name"] + PROMPT]


def test_a_template_that_does_not_tell_of_tools_refuses_them(model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "chat"
    shutil.copytree(model, directory)
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    with serve_in_process(str(directory), tool_parser="hermes", **SERVER) as api:
        answer = api.post("/v1/chat/completions", messages=MESSAGES, tools=TOOLS)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")


@pytest.mark.parametrize("choice", ["required", *range(len(MCP_TOOLS))])
def test_tools_as_they_are_out_there_can_be_forced(api: InProcessApi, choice: str | int) -> None:
    """All of a server's at once, and each."""
    names = [f"tool_{i}" for i in range(len(MCP_TOOLS))]
    tools: Any = [
        {"type": "function", "function": {"name": name, "parameters": parameters}}
        for name, parameters in zip(names, MCP_TOOLS.values(), strict=True)
    ]
    wanted: Any = choice
    if isinstance(choice, int):
        wanted = {"type": "function", "function": {"name": names[choice]}}
    options: Any = {"tools": tools, "tool_choice": wanted, "messages": MESSAGES, "seed": 1}
    answer = api.run(
        api.openai.chat.completions.create(model=api.front.model_name, max_tokens=40, **options)
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name in (names if choice == "required" else [names[int(choice)]])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"extra_body": {"ignore_eos": True}}, "ignore_eos: it cannot be combined"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "parameters": {
                                "type": "object",
                                "properties": {"a": {"uniqueItems": True}},
                            },
                        },
                    }
                ]
            },
            "a: the keyword 'uniqueItems' is not supported",
        ),
    ],
)
def test_what_cannot_be_forced(api: InProcessApi, options: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        api.run(chat(api, tool_choice="required", **({"tools": TOOLS} | options)))
