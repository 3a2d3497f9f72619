"""What the grammar of a schema lets through, asked of the compiler itself, without a model."""

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
import xgrammar

from engine.sampling.grammar.worker import compile_grammar
from engine.structured_outputs import StructuredOutputs
from tests.engine.mcp_tools import MCP_TOOLS
from tests.engine.random_schemas import random_schema

_END = 256  # after the tokens of the bytes
_MAX_BYTES = 2000
_FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER


@pytest.fixture(scope="module")
def compiler() -> Any:
    vocabulary = [bytes([byte]) for byte in range(256)] + [b""]
    info = xgrammar.TokenizerInfo(
        vocabulary, xgrammar.VocabType.RAW, vocab_size=_END + 1, stop_token_ids=[_END]
    )
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def grammar_of(compiler: Any, schema: dict[str, Any]) -> Any:
    form = StructuredOutputs(json=schema, disable_any_whitespace=True)
    return compile_grammar(compiler, form)


def accepts(grammar: Any, text: str) -> bool:
    matcher = xgrammar.GrammarMatcher(grammar)
    return all(matcher.accept_token(token) for token in [*text.encode(), _END])


def random_texts(grammar: Any, seed: int, count: int) -> Iterator[str]:
    """Texts that the grammar allows, byte by byte; those that do not end are left out."""
    choose = random.Random(seed)
    mask = xgrammar.allocate_token_bitmask(1, _END + 1)
    for _ in range(count):
        matcher, text = xgrammar.GrammarMatcher(grammar), bytearray()
        while len(text) < _MAX_BYTES:
            mask.fill_(-1)
            matcher.fill_next_token_bitmask(mask, 0)
            words = mask[0].tolist()
            allowed = [t for t in range(_END + 1) if words[t >> 5] >> (t & 31) & 1]
            closing = [token for token in allowed if token == _END or token in b'"}]']
            rather_end = closing and choose.random() < 0.2
            token = choose.choice(closing if rather_end else allowed)
            assert matcher.accept_token(token)
            if token == _END:
                yield text.decode()
                break
            text.append(token)


@pytest.mark.parametrize("batch", range(4))
def test_what_the_grammar_of_a_random_schema_allows_is_an_instance(
    compiler: Any, batch: int
) -> None:
    """Also in what the schema says of formats, which a validator only looks at when asked to."""
    checked = 0
    for seed in range(40 * batch, 40 * batch + 40):
        schema = random_schema(seed)
        for text in random_texts(grammar_of(compiler, schema), seed, 2):
            jsonschema.validate(json.loads(text), schema, format_checker=_FORMATS)
            checked += 1
    assert checked > 60


ACCEPTED: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    # (schema, instances that can be written, values that cannot)
    ({"enum": [2**63 - 1, -(2**63)]}, [2**63 - 1, -(2**63)], [2**63]),
    ({"type": "string", "enum": ["a", 1, None]}, ["a"], [1, None]),
    ({"type": "integer", "enum": [1, 1.5, True, 2.0]}, [1, 2], [1.5, True]),
    ({"type": ["number", "null"], "enum": [1, 1.5, "a", None]}, [1, 1.5, None], ["a"]),
    ({"type": "integer", "anyOf": [{"const": "a"}, {"const": 3}]}, [3], ["a"]),
    ({"type": "integer", "anyOf": [{}, {"type": "string"}]}, [3], ["a", 1.5]),
    ({"type": "integer", "anyOf": [{"type": "number", "minimum": 3}]}, [3], [2, 3.5]),
    (
        {"type": "string", "$ref": "#/$defs/a", "$defs": {"a": {"type": ["string", "null"]}}},
        ["a"],
        [None],
    ),
    ({"type": "string", "allOf": [{"maxLength": 2}]}, ["ab"], ["abc", 1]),
    # Annotations are no constraints; a string's own formats are.
    ({"type": "integer", "format": "int32"}, [1, 2**40], ["a"]),
    ({"type": "number", "format": "double", "minimum": 0}, [0.5], [-1]),
    ({"type": ["integer", "null"], "format": "uint", "minimum": 0}, [0, None], [-1]),
    ({"type": "integer", "format": "date"}, [5], ["2024-01-01"]),
    ({"type": "string", "format": "password", "minLength": 2}, ["ab"], ["a"]),
    ({"type": "string", "format": "date", "minLength": 1}, ["2024-02-29"], ["2023-02-29", "a"]),
    ({"type": "string", "format": "date-time"}, ["2024-12-31T23:59:59Z"], ["2024-11-31T00:00:00Z"]),
    ({"type": "string", "format": "ipv4"}, ["10.0.0.255"], ["10.0.0.256", "010.0.0.1"]),
    (
        {"type": "string", "format": "uri", "minLength": 1, "maxLength": 200},
        ["https://a.example:8080/b?c=%20d", "http://a"],
        ["a", "http://a/" + "b" * 192],
    ),
    ({"type": "array", "items": {"type": "null"}, "uniqueItems": False}, [[None, None]], [[1]]),
    ({"type": "object", "propertyNames": {"type": "string"}}, [{"a": 1}], [1]),
    ({"type": "string", "title": "t", "contentMediaType": "text/html", "x-y": 1}, ["a"], [1]),
    ({"type": "string", "minLength": 0, "maxLength": None, "enum": None}, ["abc"], [1]),
    # As OpenAPI 3.0 and older drafts say it.
    ({"type": "string", "nullable": True}, ["a", None], [1]),
    ({"type": "string", "nullable": False}, ["a"], [None]),
    ({"type": "string", "nullable": True, "enum": ["a", None]}, ["a", None], ["b"]),
    ({"type": "string", "nullable": True, "enum": ["a"]}, ["a"], [None]),
    ({"enum": ["a"], "nullable": True}, ["a"], [None]),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, [4], [3]),
    ({"type": "integer", "minimum": 3, "exclusiveMinimum": False}, [3], [2]),
    ({"type": "integer", "exclusiveMinimum": 0}, [1], [0]),
    (
        {"type": "array", "items": [{"type": "string"}], "additionalItems": {"type": "integer"}},
        [["a"], ["a", 1]],
        [[1], ["a", "b"]],
    ),
    # Bounds of integers are whole, and of 64 bits.
    ({"type": "integer", "minimum": 0.5, "maximum": 2.5}, [1, 2], [0, 3]),
    ({"type": "integer", "exclusiveMinimum": 0.5, "exclusiveMaximum": 2.5}, [1, 2], [0, 3]),
    ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, [0, 2**63 - 1], [-1]),
    ({"type": "integer", "minimum": -(10**30)}, [-(2**63), 5], [1.5]),
    # References.
    (
        {
            "type": "object",
            "properties": {
                "a": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "b": {"$ref": "#/properties/a/anyOf/0"},
                "c": {"$ref": "#/$defs/x~1y%25"},
                "d": {"$ref": "#"},
            },
            "$defs": {"x/y%": {"type": "string"}, "unused": {"not": {"type": "null"}}},
        },
        [{"a": None, "b": 1, "c": "s", "d": {"a": 1}}],
        [{"b": None}, {"c": 1}, {"d": 1}],
    ),
    (
        {
            "type": "object",
            "properties": {
                "inner": {
                    "$id": "inner",
                    "type": "object",
                    "properties": {"again": {"$ref": "#"}, "x": {"$ref": "#/$defs/x"}},
                    "$defs": {"x": {"const": 1}},
                }
            },
            "$defs": {"x": {"const": 2}},
        },
        [{"inner": {"again": {"x": 1}}}],
        [{"inner": {"x": 2}}, {"inner": {"inner": {}}}],
    ),
    ({"type": "object", "additionalProperties": {"not": {}}}, [{}], [{"a": 1}]),
]


@pytest.mark.parametrize(("schema", "right", "wrong"), ACCEPTED, ids=[str(s) for s, *_ in ACCEPTED])
def test_what_can_be_written(
    compiler: Any, schema: dict[str, Any], right: list[Any], wrong: list[Any]
) -> None:
    grammar = grammar_of(compiler, schema)

    def text(value: Any) -> str:
        return json.dumps(value, separators=(", ", ": "))

    assert [value for value in right if not accepts(grammar, text(value))] == []
    assert [value for value in wrong if accepts(grammar, text(value))] == []


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"enum": [1, 2**63]}, "json.enum: integers of more than 64 bits .*9223372036854775808"),
        ({"const": {"a": [-(10**30)]}}, "json.const: integers of more than 64 bits"),
        ({"enum": [float("inf")]}, "json.enum: inf is not a number"),
        ({"type": "integer", "minimum": 2**63}, "json: there is no integer of 64 bits"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "json: there is no integer .* 3 to 2"),
        ({"type": "number", "minimum": "3"}, "json.minimum: must be a number"),
        ({"type": "string", "enum": [1, None]}, "json.enum: no value of type string"),
        ({"type": "string", "const": 1}, "json.const: no value of type string"),
        ({"type": "string", "anyOf": [{"const": 1}]}, "json.anyOf.0.const: no value of type str"),
        (
            {"type": "string", "$ref": "#/$defs/a", "$defs": {"a": {"type": "null"}}},
            "json.\\$defs.a.type: null contradicts what stands around it: string",
        ),
        ({"type": []}, "json.type: must be a type's name or a list"),
        ({"type": "strin"}, "json.type: 'strin' is no type of JSON, which are array, boolean, int"),
        (
            {"type": "object", "properties": {"a": {"type": ["null", "int"]}}},
            "json.properties.a.type: 'int' is no type",
        ),
        ({"$ref": "#/$defs/a"}, "json.\\$ref: there is no '#/\\$defs/a' in the schema"),
        ({"$ref": "#a"}, "json.\\$ref: only references within"),
        ({"type": "string", "format": "regex"}, "json.format: 'regex' is not supported"),
        ({"type": "array", "uniqueItems": True}, "the keyword 'uniqueItems' is not supported"),
        ({"anyOf": [{}] * 12_000}, "json: the schema is too large"),
    ],
)
def test_what_is_refused_by_name(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        StructuredOutputs(json=schema)


@pytest.mark.parametrize("name", MCP_TOOLS)
def test_schemas_of_tools_as_they_are_out_there(compiler: Any, name: str) -> None:
    schema = MCP_TOOLS[name]
    grammar = grammar_of(compiler, schema)
    validator = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    texts = list(random_texts(grammar, 1, 12))
    for text in texts:
        validator(schema, format_checker=_FORMATS).validate(json.loads(text))
    assert len(texts) > 2
