"""Reasoning and tool calls in a model's text: the same result however the text is cut."""

import itertools
import json
import sys
from dataclasses import dataclass, field
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.parsing import (
    ANY,
    FORMATS,
    REASONING_FORMATS,
    Arguments,
    CallStart,
    Content,
    Functions,
    OutputParser,
    Piece,
    Reasoning,
    reasoning_format,
    tool_format,
)
from deployments.parsing.formats import ToolParserName
from deployments.parsing.reasoning import ReasoningParserName
from deployments.parsing.source import BLANKS
from engine.demo import DEMO_MODEL
from engine.text.tokenizer import Tokenizer
from tests.deployments.written_calls import functions_of, write_call

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
            case CallStart(index, name, call_id):
                assert index == len(found.calls)
                found.calls.append([name, ""])
                found.ids.append(call_id)
            case Arguments(index, text):
                assert index == len(found.calls) - 1
                found.calls[index][1] += text
    return found


def parse(
    texts: list[str],
    tools: ToolParserName = "none",
    think: bool | None = None,
    single: bool = False,
    functions: Functions = ANY,
    reasoning: str = "think",
) -> Found:
    parser = OutputParser(
        think,
        tool_format(tools, None),
        single_call=single,
        functions=functions,
        reasoning=REASONING_FORMATS[reasoning],
    )
    pieces = [piece for text in texts for piece in parser.push(text, last=False)]
    return put_together(pieces + parser.push("", last=True))


def call(text: str) -> list[Any]:
    parsed = json.loads(text)
    return [parsed["name"], parsed.get("arguments", parsed.get("parameters"))]


def loaded(found: Found) -> list[list[Any]]:
    return [[name, json.loads(arguments)] for name, arguments in found.calls]


TRICKY = st.sampled_from(['"', "\\", "\n", "<", "</", "}", "'", "é漢👋", "<|", "[", ": ", "null"])
STRINGS = st.lists(TRICKY | st.text(max_size=4), max_size=4).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | STRINGS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(STRINGS, inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "days", "a_b"]), VALUES, max_size=3)
STOP = '{"name": "stop", "arguments": {}}'
UNKNOWN_KEY = '<tool_call>{"name": "w", "args": {}}</tool_call>'
XML_CALL = """<tool_call>
<function=weather>
<parameter=city>
Paris
</parameter>
</function>
</tool_call>"""
QUOTED_MARK = (
    '{"name": "write", "arguments": {"text": "</tool_call> \\"[TOOL_CALLS]\\" <tool_call>{"}}'
)
LONGEST_NAME = json.dumps({"name": "n" * 128, "arguments": {}})
TOO_LONG = "<tool_call>" + json.dumps({"name": "n" * 129, "arguments": {}}) + "</tool_call>"
# What a text says -> its content, its calls.
HERMES = {
    f"<tool_call>\n{PARIS}\n</tool_call>": ("", [PARIS]),
    f"Let me see.\n<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>{OSLO}</tool_call>": (
        "Let me see.",
        [PARIS, OSLO],
    ),
    f"One.\n\n<tool_call>{PARIS}</tool_call> Two. <tool_call>{OSLO}</tool_call>\n\nThree.\n": (
        "One. Two.\n\nThree.\n",
        [PARIS, OSLO],
    ),
    "a < b <tool> and </tool_call>": ("a < b <tool> and </tool_call>", []),
    "Answer\n\nin lines \n": ("Answer\n\nin lines \n", []),
    # Other keys, another order, other ways to say the arguments.
    '<tool_call>{"arguments": {"city": "Paris"}, "name": "weather"}</tool_call>': ("", [PARIS]),
    '<tool_call>{"id": 7, "name": "weather", "parameters": {"city": "Paris"}, "x": "}"}': (
        "",
        [PARIS],
    ),
    f'<tool_call>{{"type": "function", "function": {PARIS}, "id": "1"}}</tool_call>': ("", [PARIS]),
    f"<tool_call>{LONGEST_NAME}</tool_call>": ("", [LONGEST_NAME]),
    '<tool_call>{"name": "stop"}</tool_call>': ("", [STOP]),
    '<tool_call>{"name": "stop", "arguments": null}</tool_call>': ("", [STOP]),
    '<tool_call>{"name": "stop", "arguments": ""}</tool_call>': ("", [STOP]),
    r'<tool_call>{"name": "weather", "arguments": "{\"city\": \"Paris\"}"}</tool_call>': (
        "",
        [PARIS],
    ),
    '<tool_call>{"name": "say", "arguments": "hello"}</tool_call>': (
        "",
        ['{"name": "say", "arguments": "hello"}'],
    ),
    f"<tool_call>{QUOTED_MARK}</tool_call>": ("", [QUOTED_MARK]),
    # What is no call is content as it was written, and costs no other call.
    "<tool_call>not json</tool_call>": ("<tool_call>not json</tool_call>", []),
    "<tool_call> \n {  x } </tool_call> \n": ("<tool_call> \n {  x } </tool_call> \n", []),
    '<tool_call>{"city": 1}</tool_call> end': ('<tool_call>{"city": 1}</tool_call> end', []),
    f"{UNKNOWN_KEY}<tool_call>{STOP}</tool_call>": (UNKNOWN_KEY, [STOP]),
    f"{TOO_LONG}<tool_call>{STOP}</tool_call>": (TOO_LONG, [STOP]),
    f"{XML_CALL}\n<tool_call>{STOP}</tool_call>": (XML_CALL, [STOP]),
    f"Write <tool_call> before a call.\n<tool_call>{STOP}</tool_call>": (
        "Write <tool_call> before a call.",
        [STOP],
    ),
    f'<tool_call>{{"name": <tool_call>{PARIS}</tool_call>': ('<tool_call>{"name":', [PARIS]),
    '<tool_call>{"name": "f", "arguments": {broken}}</tool_call>': (
        '<tool_call>{"name": "f", "arguments": {broken}}</tool_call>',
        [],
    ),
    '<tool_call>{"name": "f", "arguments": {\'a\': 1}}</tool_call>': (
        '<tool_call>{"name": "f", "arguments": {\'a\': 1}}</tool_call>',
        [],
    ),
    # What a call has too much of is not said, and what it lacks costs no other call.
    f"<tool_call><tool_call>\n{PARIS}</tool_call>\n</tool_call>": ("", [PARIS]),
    f"<tool_call>{PARIS}}}}}</tool_call> ok": (" ok", [PARIS]),
    f"<tool_call>{PARIS}\n{OSLO}</tool_call>": ("", [PARIS, OSLO]),
    f"<tool_call>[{PARIS}, {OSLO}]</tool_call>": ("", [PARIS, OSLO]),
    f"<tool_call>{PARIS[:-1]}</tool_call><tool_call>{OSLO}</tool_call>": ("", [PARIS, OSLO]),
    f"<tool_call>{PARIS}<tool_call>{OSLO}": ("", [PARIS, OSLO]),
    f"<tool_call>{PARIS} 17 degrees, or so": (" 17 degrees, or so", [PARIS]),
    f"<tool_call>{PARIS}, and so on": (", and so on", [PARIS]),
}
LLAMA = {
    PARIS.replace("arguments", "parameters"): ("", [PARIS]),
    f"<|python_tag|>{PARIS}; {OSLO}": ("", [PARIS, OSLO]),
    f"<|python_tag|>{PARIS}<|python_tag|>{OSLO}": ("", [PARIS, OSLO]),
    f"{PARIS};\n{OSLO}\n": ("", [PARIS, OSLO]),
    f"\n{PARIS} 17 degrees\n\nor so": (" 17 degrees\n\nor so", [PARIS]),
    f"I look: {PARIS} Done {{see}}.": ("I look: Done {see}.", [PARIS]),
    '{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}': ("", [PARIS]),
    f'{{"name": "weather", "parameters": {{{PARIS}': (
        '{"name": "weather", "parameters": {',
        [PARIS],
    ),
    f"{PARIS}}}": ("", [PARIS]),
    "<|python_tag|>print(1)": ("<|python_tag|>print(1)", []),
    '<|python_tag|>{"name": "stop"}': ("", [STOP]),
    '{"name": "stop"}': ('{"name": "stop"}', []),
    '{"answer": 42}': ('{"answer": 42}', []),
    '{"name": "Bob"} is an object': ('{"name": "Bob"} is an object', []),
    '{"name": "f", "description": "A tool.", "parameters": {"type": "object"}}': (
        '{"name": "f", "description": "A tool.", "parameters": {"type": "object"}}',
        [],
    ),
    "It is {sunny}.": ("It is {sunny}.", []),
    "; \n{": ("; \n{", []),
    "<b>": ("<b>", []),
}
MISTRAL = {
    f"[TOOL_CALLS] [{PARIS}, {OSLO}]": ("", [PARIS, OSLO]),
    f"[TOOL_CALLS]{PARIS}": ("", [PARIS]),
    f"[TOOL_CALLS] [{PARIS}] [1, 2]": (" [1, 2]", [PARIS]),
    'Well. [TOOL_CALLS]weather[ARGS]{"city": "Paris"}': ("Well.", [PARIS]),
    '[TOOL_CALLS]weather{"city": "Paris"}[TOOL_CALLS]weather[CALL_ID]1[ARGS]'
    + json.dumps(json.loads(OSLO)["arguments"]): ("", [PARIS, OSLO]),
    'The [TOOL_CALLS] token, then [TOOL_CALLS]weather{"city": "Paris"}': (
        "The [TOOL_CALLS] token, then",
        [PARIS],
    ),
    '[TOOL_CALLS]{"city": "Paris"}': ('[TOOL_CALLS]{"city": "Paris"}', []),
    '[TOOL_CALLS] {"a": [1]} x': ('[TOOL_CALLS] {"a": [1]} x', []),
    "[TOOL_CALLS][1, 2]": ("[TOOL_CALLS][1, 2]", []),
    "[TOOL_CALLS]weather": ("[TOOL_CALLS]weather", []),
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


@settings(max_examples=20, deadline=None, derandomize=True)
@given(arguments=ARGUMENTS)
@pytest.mark.parametrize("name", FORMATS)
def test_what_a_model_writes_is_read_however_it_is_cut(
    name: ToolParserName, arguments: dict[str, Any]
) -> None:
    text = f"Hm.\n{write_call(name, 'weather', arguments)}"
    functions = functions_of(**arguments)
    for texts in ([text], list(text), *([text[:i], text[i:]] for i in range(1, len(text), 7))):
        found = parse(texts, name, functions=functions)
        assert (found.content, loaded(found)) == ("Hm.", [["weather", arguments]])


def test_arguments_are_passed_on_as_they_come() -> None:
    chosen = tool_format("hermes", None)
    assert chosen is not None
    parser = OutputParser(None, chosen)
    start, first = parser.push('<tool_call>{"name": "f", "arguments": {"text": "on', False)
    assert isinstance(start, CallStart) and start.name == "f"
    assert first == Arguments(0, '{"text": "on')
    assert parser.push("ce ", False) == [Arguments(0, "ce ")]
    assert parser.push('upon"}', False) == [Arguments(0, 'upon"}')]
    assert parser.push("}", False) == []
    assert parser.num_calls == 1


def test_a_call_cut_off_by_the_token_limit_keeps_what_it_had() -> None:
    found = parse(['<tool_call>{"name": "f", "arguments": {"text": "on'], "hermes")
    assert found.calls == [["f", '{"text": "on']]
    assert parse(['<tool_call>{"name": "f'], "hermes").content == '<tool_call>{"name": "f'


def test_a_call_whose_arguments_lack_an_end_costs_no_other_call() -> None:
    text = f'<tool_call>{{"name": "f", "arguments": {{"a": [1</tool_call> <tool_call>{PARIS}'
    found = parse([text], "hermes")
    assert found.calls == [["f", '{"a": [1'], ["weather", '{"city": "Paris"}']]
    assert found.content == ""
    text = (
        f'<tool_call>{{"name": "f", "arguments": {{"a": "5" pipe"}}}}</tool_call><tool_call>{PARIS}'
    )
    calls = parse([text], "hermes").calls
    assert calls == [["f", '{"a": "5" pipe"}}'], ["weather", '{"city": "Paris"}']]
    text = '[TOOL_CALLS]f{"a": [1, [2][TOOL_CALLS]weather{"city": "Paris"}'
    assert parse([text], "mistral").calls == [
        ["f", '{"a": [1, [2]'],
        ["weather", '{"city": "Paris"}'],
    ]


@pytest.mark.parametrize("cut", [0, 5, 12, 30, 40, 100])
def test_of_a_forced_call_nothing_is_content(cut: int) -> None:
    """Not the part of it that the prompt has, not what the token limit leaves of its name."""
    parser = OutputParser(None, tool_format("hermes", None), forced_prefix="<tool_call>\n")
    pieces = parser.push(PARIS[:cut], last=False) + parser.push("", last=True)
    assert not any(isinstance(piece, Content) for piece in pieces)
    arguments = PARIS[:-1][PARIS.index('{"city') : cut]
    assert put_together(pieces).calls == ([["weather", arguments]] if arguments else [])


# How a template or a model writes calls otherwise than in `written_calls`.
OTHERWISE: dict[ToolParserName, list[tuple[str, int]]] = {
    "minimax_m2": [
        (
            '<minimax:tool_call>\n<invoke name="weather">\n'
            '<parameter name="city">Paris</parameter>\n</invoke>\n<invoke name="weather">\n'
            '<parameter name="city">Paris</parameter>\n</invoke>\n</minimax:tool_call>',
            2,
        )
    ],
    "harmony": [
        (' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>', 1),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant to=functions.weather"
            '<|channel|>commentary <|constrain|>json<|message|>{"city": "Paris"}<|call|>',
            1,
        ),
        ("to=functions.weather is how one calls", 0),
    ],
}


@pytest.mark.parametrize(
    ("name", "text", "count"), [(name, *case) for name in OTHERWISE for case in OTHERWISE[name]]
)
def test_calls_are_found_where_templates_write_them_otherwise(
    name: ToolParserName, text: str, count: int
) -> None:
    for texts in ([text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))):
        found = parse(texts, name, functions=functions_of(city="Paris"))
        assert loaded(found) == [["weather", {"city": "Paris"}]] * count
        assert found.content == ("" if count else text)


def test_kimis_templates_know_calls_by_their_number_in_the_conversation() -> None:
    text = write_call("kimi_k2", "weather", {}) + write_call("kimi_k2", "stop", {})
    parser = OutputParser(None, tool_format("kimi_k2", None), num_called=3)
    ids = put_together(parser.push(text, last=True)).ids
    assert ids == ["functions.weather:3", "functions.stop:4"]


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("{'a': [1, True], 'b': 'x'}", {"a": [1, True], "b": "x"}),  # as Seed-OSS's template
        ("['it''s', None]", ["its", None]),
        ("True", True),
        ("None", None),
        ("{'a', 1}", "{'a', 1}"),  # has no form in JSON
        ("{'a': open('x')}", "{'a': open('x')}"),
        ("[" * 500, "[" * 500),
        ("yes", "yes"),
    ],
)
def test_values_in_tags_may_be_written_as_python_writes_them(written: str, value: Any) -> None:
    call = f"<function=weather>\n<parameter=more>{written}</parameter>\n</function>"
    found = parse([f"<seed:tool_call>\n{call}\n</seed:tool_call>"], "seed_oss")
    assert loaded(found) == [["weather", {"more": value}]]


@pytest.mark.parametrize("name", FORMATS)
def test_what_calls_a_function_that_is_not_there_is_text(name: ToolParserName) -> None:
    """An agent that is told to call it has nothing to call."""
    known = functions_of(city="Oslo")
    right, wrong = (write_call(name, f, {"city": "Oslo"}) for f in ("weather", "weather_in"))
    found = parse([f"{wrong}\n{right}"], name, functions=known)
    assert loaded(found) == [["weather", {"city": "Oslo"}]] and "Oslo" in found.content
    assert not parse([wrong], name, functions=known).calls


def test_mistral_call_ids_are_what_its_templates_demand() -> None:
    (call_id,) = parse([f"[TOOL_CALLS][{PARIS}]"], "mistral").ids
    assert len(call_id) == 9 and call_id.isalnum()


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
        *(
            "<think>",
            "</think>",
            "<answer>",
            "</answer>",
            "<",
            "<tool",
            "[TOOL",
            "weather",
            " ",
            "\n",
            "\n\n",
            " \t",
            "é漢👋",
        ),
        *(
            "{",
            "}",
            "[",
            "]",
            '"',
            "\\",
            '\\"',
            ",",
            ";",
            ":",
            "null",
            "1",
            "'",
            "a word",
            XML_CALL,
        ),
        *(
            '"name"',
            '"arguments": ',
            '"parameters":',
            '"function": {',
            '"name": "f", "arguments": {',
        ),
        *(
            '{"name": "f", "arguments": {"a": "5" pipe"}}',
            '"5" pipe"',
            '" :',
            '{,"name":',
            '{ "id": 1 "name": ',
        ),
        *(PARIS, OSLO, STOP, QUOTED_MARK, UNKNOWN_KEY, PARIS[:-1], PARIS[1:], PARIS[:20]),
        *(f"<tool_call>{PARIS}</tool_call>", f"[TOOL_CALLS][{PARIS}]", '[TOOL_CALLS]f{"a": 1}'),
    ]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=3), max_size=12).map("".join)


CUT_ANYHOW = given(
    name=st.sampled_from(["none", *FORMATS]),
    think=st.sampled_from([None, False, True]),
    single=st.booleans(),
    reasoning=st.sampled_from(list(REASONING_FORMATS)),
    text=TEXTS,
    cuts=st.lists(st.integers(0, 200), max_size=8),
)


@settings(max_examples=250, deadline=None, derandomize=True)
@CUT_ANYHOW
def test_what_is_found_does_not_depend_on_how_the_text_is_cut(**case: Any) -> None:
    check_cut(**case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=20_000, deadline=None)
@CUT_ANYHOW
def test_what_is_found_never_depends_on_how_the_text_is_cut(**case: Any) -> None:
    check_cut(**case)


def check_cut(
    name: ToolParserName,
    think: bool | None,
    single: bool,
    reasoning: str,
    text: str,
    cuts: list[int],
) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
    whole = parse([text], name, think, single, reasoning=reasoning)
    for texts in (pieces, list(text)):
        cut = parse(texts, name, think, single, reasoning=reasoning)
        assert (cut.content, cut.reasoning, cut.calls) == (
            whole.content,
            whole.reasoning,
            whole.calls,
        )
    if think is None and not whole.calls:
        # Of a message in a channel, white space at its end is not said.
        assert whole.content == (text.rstrip(BLANKS) if name == "harmony" else text)
    assert not single or len(whole.calls) <= 1


HEADS: list[tuple[ToolParserName, str, str]] = [
    ("hermes", "<tool_call>", " "),
    ("hermes", '<tool_call>{"name": "', "a"),
    ("hermes", '<tool_call>{"name": "', "a "),
    ("hermes", '<tool_call>{"id": "', "a "),
    ("hermes", '<tool_call>{"arguments": {"a": "', "b "),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "', "b\\"),
    ("hermes", '<tool_call>{"name": "f"', " "),
    ("hermes", "", "<tool_call>"),
    ("hermes", "", '<tool_call>{"id": "'),
    ("hermes", "", "\n"),
    ("llama3_json", '{"name": "', "abcd"),
    ("llama3_json", '{"id": "', "abcd"),
    ("llama3_json", "", '{"name'),
    ("mistral", "[TOOL_CALLS]", "a"),
    ("mistral", "[TOOL_CALLS][", "["),
    ("mistral", "", "[TOOL_CALLS]a"),
]


@pytest.mark.parametrize(("name", "head", "more"), HEADS)
@pytest.mark.parametrize("think", [None, True])
def test_the_work_grows_with_the_text_alone(
    name: ToolParserName, head: str, more: str, think: bool | None
) -> None:
    """However long what may become a call goes on: a piece is not looked at again with the next."""

    def work(count: int) -> tuple[int, int]:
        """(characters that the parser had before it, function calls) over so many pieces."""
        parser = OutputParser(think, tool_format(name, None))
        seen = calls = 0

        def note(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            for text in [head, *[more] * count]:
                seen += parser.num_waiting + len(text)
                parser.push(text, last=False)
        finally:
            sys.setprofile(None)
        return seen, calls

    (seen, calls), (twice_seen, twice_calls) = work(400), work(800)
    assert twice_seen <= 2.2 * seen and twice_calls <= 2.2 * calls
    assert seen <= 12 * (len(head) + 400 * len(more))


THINK = {
    "<think>\nI see\n</think>\n\nYes.\n": ("I see", "Yes.\n"),
    "  <think>I see</think>Yes <think>x</think>": ("I see", "Yes <think>x</think>"),
    "No thought": ("", "No thought"),
    "<thin": ("", "<thin"),
    "<think>cut\n\noff\n": ("cut\n\noff", ""),
    "\n x": ("", "\n x"),
    "\n": ("", "\n"),
    "a <think>b</think>": ("", "a <think>b</think>"),
}


@pytest.mark.parametrize("text", THINK)
def test_reasoning_is_split_off_however_the_text_is_cut(text: str) -> None:
    for texts in ([text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))):
        found = parse(texts, think=False)
        assert (found.reasoning, found.content) == THINK[text], texts


ANSWER = {
    "<think>\nI see\n</think>\n<answer>\nYes.\n</answer>": ("I see", "Yes.", 0),
    "<think>\n\n</think>\n<answer>Yes.\n\nNo.</answer>\n": ("", "Yes.\n\nNo.", 0),
    "<answer>\nYes.": ("", "Yes.", 0),
    "Yes.</answer>": ("", "Yes.</answer>", 0),  # which has not begun
    "<answer>A page: <answer>a</answer> b </answer>": ("", "A page: <answer>a</answer> b", 0),
    "<think>no</think>\n\nYes.": ("no", "Yes.", 0),
    f"<think>a</think>\n<answer>\nI look.\n<tool_calls>[{PARIS}]</tool_calls>\n</answer>": (
        *("a", "I look."),
        1,
    ),
    f"<think>a</think>\n<answer>I look.</answer>\n<tool_calls>[{PARIS}]</tool_calls>": (
        *("a", "I look."),
        1,
    ),
}


@pytest.mark.parametrize("text", ANSWER)
def test_marks_around_an_answer_are_not_said(text: str) -> None:
    reasoning, content, count = ANSWER[text]
    tools: list[ToolParserName] = ["hunyuan"] if count else ["none", "hunyuan"]
    for name in tools:
        for texts in ([text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))):
            found = parse(texts, name, think=False, reasoning="hunyuan")
            assert (found.reasoning, found.content) == (reasoning, content), texts
            assert loaded(found) == [call(PARIS)] * count


def test_reasoning_that_the_prompt_opened_needs_no_tag() -> None:
    found = parse(list("hmm</think>\nyes"), think=True)
    assert (found.reasoning, found.content) == ("hmm", "yes")


def test_a_block_may_be_opened_by_the_prompt_and_again_by_the_model() -> None:
    found = parse(["<think>\nhmm\n</think>\n\nyes"], think=True)
    assert (found.reasoning, found.content) == ("hmm", "yes")


CALL = f"<tool_call>\n{PARIS}\n</tool_call>"
THOUGHTFUL = {
    f"<think>\nWeather? <tool_call>\n</think>\n\n{CALL}": ("Weather? <tool_call>", "", 1),
    # Only thought of: something else follows.
    f"<think>\nI could say {CALL}, but no.\n</think>\n\nNo.": (
        f"I could say {CALL}, but no.",
        "No.",
        0,
    ),
    f"<think>\n{CALL}\n</think>\n\n{CALL}": (CALL, "", 1),
    f"<think>\n{CALL}\n</think>\n\nNo.": (CALL, "No.", 0),
    f"<think>\n{CALL}, or not": (f"{CALL}, or not", "", 0),
    # Meant: the block was not closed before it, or at all.
    f"<think>\nI look.\n{CALL}": ("I look.", "", 1),
    f"<think>\nI look.\n{CALL}\n": ("I look.", "", 1),
    f"<think>\nI look.\n{CALL}\n{CALL}": ("I look.", "", 2),
    f"<think>\nI look.\n{CALL}\n</think>\n": ("I look.", "", 1),
    f"<think>\nNot {CALL}. But:\n{CALL}": (f"Not {CALL}. But:", "", 1),
}


@pytest.mark.parametrize("text", THOUGHTFUL)
def test_calls_in_a_think_block_are_meant_if_the_output_ends_with_them(text: str) -> None:
    reasoning, content, count = THOUGHTFUL[text]
    for texts in ([text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))):
        found = parse(texts, "hermes", think=False)
        assert (found.reasoning, found.content) == (reasoning, content)
        assert loaded(found) == [call(PARIS)] * count
    assert len(parse([text], "hermes", think=False, single=True).calls) == min(count, 1)


@pytest.mark.parametrize("name", FORMATS)
def test_behind_a_single_call_nothing_is_read(name: ToolParserName) -> None:
    parser = OutputParser(None, tool_format(name, None), single_call=True)
    text = f"Hm.{write_call(name, *call(PARIS))}"
    assert not parser.is_over
    more = f"{write_call(name, *call(OSLO))} and so on"
    found = put_together(parser.push(text + more, last=False))
    assert parser.is_over and parser.num_calls == 1
    assert (found.content, loaded(found)) == ("Hm.", [call(PARIS)])
    assert parser.push("more", last=True) == []


def test_formats_are_told_from_the_chat_template() -> None:
    named = {name for some in get_args(ToolParserName) for name in get_args(some)}
    assert {"auto", "none", *FORMATS} == named
    assert {"auto", "none", *REASONING_FORMATS} == set(get_args(ReasoningParserName))
    demo = Tokenizer(DEMO_MODEL).chat_template
    chosen = tool_format("auto", demo)
    assert chosen is not None and chosen.name == "hermes"
    assert reasoning_format("auto", demo)
    mistral = tool_format("auto", "{% if tools %}[AVAILABLE_TOOLS]…[TOOL_CALLS] {% endif %}")
    assert mistral is not None and mistral.name == "mistral"
    llama = '{%- if tools %}{"name": function name, "parameters": dictionary}{%- endif %}ipython'
    found = tool_format("auto", llama)
    assert found is not None and found.name == "llama3_json"
    # What only looks like a format is none.
    for other in ("<function=name>{json}</function>", "<|tool_call:begin|>"):
        assert tool_format("auto", f"{{% if tools %}}{other}{{% endif %}}") is None
    assert tool_format("auto", "{{ messages }}") is None
    assert not reasoning_format("auto", "{{ messages }}")
    assert tool_format("none", demo) is None and not reasoning_format("none", demo)
