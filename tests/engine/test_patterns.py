"""Strings in JSON have the pattern that was asked for: all of them, and only these."""

import itertools
import json
import random
import re
from typing import Any

import pytest
import xgrammar

from engine.sampling.grammar.worker import compile_grammar
from engine.structured_outputs import StructuredOutputs
from tests.engine.test_json_schema import accepts, compiler, grammar_of, random_texts  # noqa: F401


@pytest.fixture(scope="module", params=["a string", "all of it"])
def ask(request: pytest.FixtureRequest, compiler: Any) -> "Ask":  # noqa: F811
    return Ask(compiler, request.param == "a string")


class Ask:
    """What the grammar of a pattern lets through, for a string in JSON or for the whole output."""

    def __init__(self, compiler: Any, in_json: bool) -> None:  # noqa: F811
        self._compiler, self._in_json = compiler, in_json

    def grammar(self, pattern: str) -> Any:
        form = (
            StructuredOutputs(json=of(pattern))
            if self._in_json
            else StructuredOutputs(regex=pattern)
        )
        return compile_grammar(self._compiler, form)

    def accepts(self, grammar: Any, text: str) -> bool:
        return accepts(grammar, json.dumps(text, ensure_ascii=False) if self._in_json else text)

    def texts(self, pattern: str, count: int) -> list[str]:
        found = random_texts(self.grammar(pattern), 3, count)
        return [json.loads(text) if self._in_json else text for text in found]


def of(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern}


@pytest.mark.parametrize(
    "pattern",
    [
        r"^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$",
        r"^P(\d+D)?(T(\d+H)?(\d+M)?)?$",
        r"^[0-9]{1,3}(,[0-9]{3})*(\.[0-9]{1,2})?$",
        r"^(\d|\d{3,4})$",
        r"^v\d+(\.\d+)?(-(alpha|beta|rc)\d*)?$",
        r"^(http|https)://[a-z]+(/[a-z]+)*/?$",
        r"^\+?[1-9]\d{1,14}$",
        r"^$|^[A-Z]{2}(-[A-Z]{2})?$",
        r"^(?:a|an|ant|(?P<and>and))$",
        r"^[^\d_ ]{3}[\w.-]{1,3}\u00e9?[\]^-]$",
    ],
)
def test_what_is_written_has_the_pattern(ask: Ask, pattern: str) -> None:
    texts = ask.texts(pattern, 60)
    assert len(texts) > 20
    for text in texts:
        assert re.fullmatch(pattern, text)


@pytest.mark.parametrize("seed", range(4))
def test_random_patterns_allow_what_python_does(ask: Ask, seed: int) -> None:
    choose = random.Random(seed)
    texts = ["".join(text) for n in range(6) for text in itertools.product("ab", repeat=n)]
    for _ in range(50):
        pattern = random_pattern(choose, choose.randrange(2, 7))
        grammar = ask.grammar(f"^{pattern}$")
        for text in texts:
            is_one = re.fullmatch(pattern, text) is not None
            assert ask.accepts(grammar, text) == is_one, (pattern, text)


def random_pattern(choose: random.Random, size: int) -> str:
    if size == 1:
        return choose.choice("ab")
    kind, cut = choose.random(), choose.randrange(1, size)
    if kind < 0.6:
        parts = random_pattern(choose, cut), random_pattern(choose, size - cut)
        return f"{parts[0]}{parts[1]}" if kind < 0.35 else f"({parts[0]}|{parts[1]})"
    quantifier = choose.choice(["?", "*", "+", "{0,2}", "{2}", "{1,2}", "{2,}", "{1,}", "??"])
    part = random_pattern(choose, size - 1)
    return (part if len(part) == 1 else f"({part})") + quantifier


@pytest.mark.parametrize(
    "pattern", [r"^.{0,500}$", r"^[^a]{0,300}$", r"^\S*$", r"[\s\S]{0,200}", "(?i)[ -~]{1,200}"]
)
def test_no_pattern_lets_a_string_be_left(compiler: Any, pattern: str) -> None:  # noqa: F811
    grammar = grammar_of(compiler, of(pattern))
    assert accepts(grammar, '"B!"') and accepts(grammar, '"x~"')
    for text in ('"', '"b"b"', '"\\"', '"b\\b"', '"b\nb"'):
        assert not accepts(grammar, text)


def test_patterns_are_made_automata_once(
    compiler: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long counts take seconds."""
    made = []
    make = xgrammar.Grammar.from_json_schema

    def noted(schema: Any, **options: Any) -> Any:
        made.append(schema)
        return make(schema, **options)

    monkeypatch.setattr(xgrammar.Grammar, "from_json_schema", noted)
    grammar_of(compiler, {"type": "array", "items": {"anyOf": [of("^a?[)]$"), of("^[^b]+$")]}})
    assert len(made) == 1


def test_what_no_automaton_can_do_is_refused(compiler: Any) -> None:  # noqa: F811
    """xgrammar would let the string be left."""
    with pytest.raises(ValueError, match=r"the pattern .*\{50\}.* is not supported in a string"):
        grammar_of(compiler, of("^((a{50}){50}){50}$"))


def test_case_is_ignored_where_it_is_asked_for(ask: Ask) -> None:
    grammar = ask.grammar("(?i)^ab?[^c]$")
    assert all(ask.accepts(grammar, text) for text in ("abd", "ABD", "AD"))
    assert not any(ask.accepts(grammar, text) for text in ("abc", "abC", "b"))


@pytest.mark.parametrize("pattern", [r'^"[^"\\]{1,3}"$', r"^a\\.b$", r"^a{130}b?$", r"^\s+x$"])
def test_an_output_may_have_what_json_escapes(compiler: Any, pattern: str) -> None:  # noqa: F811
    texts = Ask(compiler, in_json=False).texts(pattern, 30)
    assert len(texts) > 20 and all(re.fullmatch(pattern, text) for text in texts)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ('^"+$', "needs a character that JSON escapes"),
        (r"^a\\b$", "needs a character that JSON escapes"),
        (r"^a\n$", "needs a character that JSON escapes"),
        (r"^(a$|b)c$", r"$ is supported at the ends alone"),
        (r"\bword\b", r"\b is not supported"),
        (r"(a)\1", r"\1 is not supported"),
        (r"\p{L}+", r"\p is not supported"),
        (r"a(?=b)", "lookahead"),
        (r"[a-z", "a class is not closed"),
    ],
)
def test_what_cannot_be_had_is_refused_at_the_door(pattern: str, says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        StructuredOutputs(json={"type": "object", "properties": {"name": of(pattern)}})
    assert "json.properties.name.pattern" in str(refused.value)
