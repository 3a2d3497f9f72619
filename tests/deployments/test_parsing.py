"""Reasoning and tool calls in a model's text: the same result however the text is cut."""

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.parsing import (
    Arguments,
    CallStart,
    Content,
    OutputParser,
    Piece,
    Reasoning,
    ReasoningSplitter,
    reasoning_format,
    tool_format,
)
from deployments.parsing.formats import ToolParserName
from engine.demo import DEMO_MODEL
from engine.tokenizer import Tokenizer

PARIS = '{"name": "weather", "arguments": {"city": "Paris"}}'
OSLO = '{"name": "weather", "arguments": {"city": "Oslo", "days": [1, {"a": "}\\""}]}}'


@dataclass
class Found:
    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)  # name, arguments
    ids: list[str] = field(default_factory=list)


def put_together(pieces: list[Piece]) -> Found:
    found = Found()
    for piece in pieces:
        match piece:
            case Content(text):
                found.content += text
            case Reasoning(text):
                found.reasoning += text
            case CallStart(index, call_id, name):
                assert index == len(found.calls)
                found.calls.append([name, ""])
                found.ids.append(call_id)
            case Arguments(index, text):
                assert index == len(found.calls) - 1
                found.calls[index][1] += text
    return found


def parse(texts: list[str], tools: ToolParserName = "none", think: bool | None = None) -> Found:
    chosen = tool_format(tools, None)
    parser = OutputParser(
        None if think is None else ReasoningSplitter(is_open=think),
        chosen.parser() if chosen else None,
    )
    pieces = [piece for text in texts for piece in parser.push(text, last=False)]
    return put_together(pieces + parser.push("", last=True))


def call(text: str) -> list[str]:
    parsed = json.loads(text)
    return [parsed["name"], parsed.get("arguments", parsed.get("parameters"))]


def loaded(found: Found) -> list[list[Any]]:
    return [[name, json.loads(arguments)] for name, arguments in found.calls]


HERMES = {
    f"<tool_call>\n{PARIS}\n</tool_call>": ("", [PARIS]),
    f"Let me see.\n<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>{OSLO}</tool_call>": (
        "Let me see.",
        [PARIS, OSLO],
    ),
    "a < b <tool> and </tool_call>": ("a < b <tool> and </tool_call>", []),
    '<tool_call>{"arguments": {"city": "Paris"}, "name": "weather"}</tool_call>': ("", [PARIS]),
    "<tool_call>not json</tool_call>": ("<tool_call>not json</tool_call>", []),
    '<tool_call>{"city": 1}</tool_call> end': ('<tool_call>{"city": 1}</tool_call> end', []),
    "Answer\n\nin lines \n": ("Answer\n\nin lines \n", []),
}
LLAMA = {
    PARIS.replace("arguments", "parameters"): ("", [PARIS]),
    f"<|python_tag|>{PARIS}; {OSLO}": ("", [PARIS, OSLO]),
    '{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}': ("", [PARIS]),
    '{"answer": 42}': ('{"answer": 42}', []),
    '{"name": "Bob"} is an object': ('{"name": "Bob"} is an object', []),
    "It is {sunny}.": ("It is {sunny}.", []),
    "<b>": ("<b>", []),
}
MISTRAL = {
    f"[TOOL_CALLS] [{PARIS}, {OSLO}]": ("", [PARIS, OSLO]),
    'Well. [TOOL_CALLS]weather[ARGS]{"city": "Paris"}': ("Well.", [PARIS]),
    '[TOOL_CALLS]weather{"city": "Paris"}[TOOL_CALLS]weather[CALL_ID]1[ARGS]'
    + json.dumps(json.loads(OSLO)["arguments"]): ("", [PARIS, OSLO]),
    "[1, 2] [TOOL": ("[1, 2] [TOOL", []),
}
CASES: list[tuple[ToolParserName, str, str, list[str]]] = [
    (name, text, content, calls)
    for name, cases in (("hermes", HERMES), ("llama3_json", LLAMA), ("mistral", MISTRAL))
    for text, (content, calls) in cases.items()
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_calls_and_content_come_apart_however_the_text_is_cut(
    name: ToolParserName, text: str, content: str, calls: list[str]
) -> None:
    cuts = [[text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))]
    for texts in cuts:
        found = parse(texts, name)
        assert (found.content, loaded(found)) == (content, [call(c) for c in calls]), texts
        assert len(set(found.ids)) == len(calls)


def test_arguments_are_passed_on_as_they_come() -> None:
    chosen = tool_format("hermes", None)
    assert chosen is not None
    parser = chosen.parser()
    start, first = parser.push('<tool_call>{"name": "f", "arguments": {"text": "on', False)
    assert isinstance(start, CallStart) and start.name == "f"
    assert first == Arguments(0, '{"text": "on')
    assert parser.push("ce ", False) == [Arguments(0, "ce ")]
    assert parser.push('upon"}', False) == [Arguments(0, 'upon"}')]
    assert parser.push("}", False) == []
    assert parser.num_ended == 1


def test_a_call_cut_off_by_the_token_limit_keeps_what_it_had() -> None:
    found = parse(['<tool_call>{"name": "f", "arguments": {"text": "on'], "hermes")
    assert found.calls == [["f", '{"text": "on']]
    assert parse(['<tool_call>{"name": "f'], "hermes").content == '<tool_call>{"name": "f'


def test_mistral_call_ids_are_what_its_templates_demand() -> None:
    (call_id,) = parse([f"[TOOL_CALLS][{PARIS}]"], "mistral").ids
    assert len(call_id) == 9 and call_id.isalnum()


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["hermes", "llama3_json", "mistral"]),
    st.text(alphabet='<>/tool_cal{}[]",:\\ nameTOOL_S;\n', max_size=60),
    st.lists(st.integers(0, 60), max_size=5),
)
def test_no_text_breaks_a_parser_and_cuts_change_nothing(
    name: ToolParserName, text: str, cuts: list[int]
) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    whole, cut = parse([text], name), parse(pieces, name)
    assert (whole.content, whole.calls) == (cut.content, cut.calls)


THINK = {
    "<think>\nI see\n</think>\n\nYes.\n": ("I see", "Yes.\n"),
    "  <think>I see</think>Yes <think>x</think>": ("I see", "Yes <think>x</think>"),
    "No thought": ("", "No thought"),
    "<thin": ("", "<thin"),
    "<think>cut\n\noff\n": ("cut\n\noff", ""),
    "\n x": ("", "\n x"),
}


@pytest.mark.parametrize("text", THINK)
def test_reasoning_is_split_off_however_the_text_is_cut(text: str) -> None:
    for texts in ([text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))):
        found = parse(texts, think=False)
        assert (found.reasoning, found.content) == THINK[text], texts


def test_reasoning_that_the_prompt_opened_needs_no_tag() -> None:
    found = parse(list("hmm</think>\nyes"), think=True)
    assert (found.reasoning, found.content) == ("hmm", "yes")


def test_a_call_follows_reasoning() -> None:
    text = f"<think>\nWeather? <tool_call>\n</think>\n\n<tool_call>\n{PARIS}\n</tool_call>"
    for texts in ([text], list(text)):
        found = parse(texts, "hermes", think=False)
        assert found.reasoning == "Weather? <tool_call>"
        assert found.content == ""
        assert loaded(found) == [call(PARIS)]


def test_formats_are_told_from_the_chat_template() -> None:
    demo = Tokenizer(DEMO_MODEL).chat_template
    chosen = tool_format("auto", demo)
    assert chosen is not None and chosen.name == "hermes"
    assert reasoning_format("auto", demo)
    mistral = tool_format("auto", "{% if tools %}[AVAILABLE_TOOLS]…[TOOL_CALLS] {% endif %}")
    assert mistral is not None and mistral.name == "mistral"
    llama = '{%- if tools %}{"name": function name, "parameters": dictionary}{%- endif %}ipython'
    found = tool_format("auto", llama)
    assert found is not None and found.name == "llama3_json"
    assert tool_format("auto", "{{ messages }}") is None
    assert not reasoning_format("auto", "{{ messages }}")
    assert tool_format("none", demo) is None and not reasoning_format("none", demo)


def test_a_forced_call_has_a_schema_and_references_find_their_way() -> None:
    """Into the parameters, wherever those stand, and not into the other function's."""
    properties = {"at": {"$ref": "#/$defs/Point"}, "again": {"$ref": "#"}}
    point = {"type": "object", "properties": properties, "additionalProperties": False}
    tool = {"name": "f", "parameters": point | {"$defs": {"Point": {"type": "integer"}}}}
    hermes, mistral = tool_format("hermes", None), tool_format("mistral", None)
    assert hermes is not None and mistral is not None
    import jsonschema

    schema = hermes.forced_schema([tool, {"name": "g"}])
    validator = jsonschema.Draft202012Validator(schema)
    assert validator.is_valid({"name": "f", "arguments": {"at": 3}})
    assert validator.is_valid({"name": "f", "arguments": {"again": {"at": 3}}})
    assert not validator.is_valid({"name": "f", "arguments": {"again": {"name": "f"}}})
    assert validator.is_valid({"name": "g", "arguments": {}})
    assert not validator.is_valid({"name": "f", "arguments": {"at": "x"}})
    assert not validator.is_valid({"name": "h", "arguments": {}})
    array = mistral.forced_schema([tool])
    assert jsonschema.Draft202012Validator(array).is_valid([{"name": "f", "arguments": {"at": 3}}])
