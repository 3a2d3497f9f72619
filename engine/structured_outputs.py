"""What form an output must have, and which forms are refused before anything is compiled.

Imports no torch: a front checks this at its door. What only a compiler can find wrong, such as a
regular expression's syntax, `engine.grammar_compiler` reports.
"""

import json
import re
from functools import cached_property
from typing import Any

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_MAX_CHARACTERS = 100_000
_MAX_DEPTH = 64

_ANNOTATIONS = {
    *("$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default"),
    *("examples", "example", "deprecated", "readOnly", "writeOnly", "discriminator"),
}
_CONSTRAINTS = {
    *("type", "properties", "required", "additionalProperties", "items", "prefixItems"),
    *("minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
_WHOLE = {"enum", "const", "anyOf", "oneOf", "allOf", "$ref"}  # each says everything by itself
_NEED_A_TYPE = {
    *("minItems", "maxItems", "minLength", "maxLength", "pattern", "format"),
    *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
}
_KINDS_OF_VALUES: dict[str, type] = {
    **dict.fromkeys(("properties", "$defs", "definitions"), dict),
    **dict.fromkeys(("required", "prefixItems", "enum", "anyOf", "oneOf", "allOf"), list),
    **dict.fromkeys(("pattern", "format", "$ref"), str),
}
_NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
_FORMATS = {
    *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri"),
    *("uri-reference", "uri-template"),
}
# xgrammar's own allows quoted local parts, which it does not escape as JSON needs it.
_EMAIL = r"^[A-Za-z0-9_%+-]+(\.[A-Za-z0-9_%+-]+)*@[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+$"
# What stands for itself in a JSON string.
CHARACTER = "[ !#-\\[\\]-\ud7ff\ue000-\U0010ffff]"
_LOOKAROUND = re.compile(r"(?<!\\)(\\\\)*\(\?<?[=!]")


# A dataclass, because a pydantic model cannot have a field called json.
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class StructuredOutputs:
    """One kind of constraint on the text of an output; names as in vLLM."""

    json: dict[str, Any] | str | None = Field(default=None, description="A JSON schema.")
    regex: str | None = Field(default=None, min_length=1, description="The whole text matches it.")
    choice: list[str] | None = Field(
        default=None, min_length=1, fail_fast=True, description="The text is one of these."
    )
    grammar: str | None = Field(
        default=None, min_length=1, description="EBNF; its start rule is root."
    )
    json_object: bool = Field(default=False, description="Any JSON object.")
    disable_any_whitespace: bool = Field(
        default=False, description="JSON with one space after colons and commas, and no other."
    )
    structural_tag: str | dict[str, Any] | None = Field(
        default=None, description="Free text with constrained parts, as xgrammar describes it."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> "StructuredOutputs":
        kinds = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(kinds) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(_KINDS)} (got {', '.join(kinds) or 'none'})"
            )
        if self.choice is not None and "" in self.choice:
            raise ValueError("choice: a choice must not be empty")
        value = getattr(self, kinds[0])
        length = len(value) if isinstance(value, str) else 0
        try:
            length = length if length > _MAX_CHARACTERS else len(self.key)
        except RecursionError as error:
            raise ValueError(f"{kinds[0]}: nested too deeply") from error
        if length > _MAX_CHARACTERS:
            raise ValueError(
                f"{kinds[0]}: {length} characters are too many; at most {_MAX_CHARACTERS} are "
                "compiled"
            )
        if kinds == ["json"]:
            self.closed_schema()
        if self.regex is not None:
            _check_regex(self.regex, "regex")
        return self

    @cached_property
    def key(self) -> str:
        """Equal constraints have equal keys."""
        return json.dumps([self.disable_any_whitespace, *(getattr(self, name) for name in _KINDS)])

    def closed_schema(self) -> dict[str, Any]:
        """The JSON schema, where objects that list properties have no others unless it says so.

        That is stricter than JSON Schema's own default, and what OpenAI and vLLM do. Raises
        ValueError naming what is not supported, rather than ignoring it.
        """
        schema: Any = self.json
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except ValueError as error:
                raise ValueError(f"json: not valid JSON: {error}") from error
            except RecursionError as error:
                raise ValueError("json: the schema is nested too deeply") from error
        if not isinstance(schema, dict):
            raise ValueError(f"json: a schema is a JSON object (got {schema!r:.100})")
        return _close(schema, "json", 0)


def _close(schema: Any, path: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError(f"json: the schema is nested too deeply; at most {_MAX_DEPTH} levels")
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, dict):
        raise ValueError(f"{path}: a schema is an object or a boolean (got {schema!r:.100})")
    _check_keywords(schema, path)
    closed = dict(schema)
    for name in ("properties", "$defs", "definitions"):
        if name in schema:
            closed[name] = {
                key: _close(value, f"{path}.{name}.{key}", depth + 1)
                for key, value in schema[name].items()
            }
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        if name in schema:
            if not schema[name]:
                raise ValueError(f"{path}.{name}: must not be empty")
            closed[name] = [
                _close(value, f"{path}.{name}.{i}", depth + 1)
                for i, value in enumerate(schema[name])
            ]
    for name in ("items", "additionalProperties"):
        if name in schema:
            closed[name] = _close(schema[name], f"{path}.{name}", depth + 1)
    if "properties" in schema:
        closed.setdefault("additionalProperties", False)
    return _respell_string(closed, path)


def _respell_string(schema: dict[str, Any], path: str) -> dict[str, Any]:
    """A string's rules as a pattern where the compiler would else allow what is not JSON."""
    least, most = schema.pop("minLength", None), schema.pop("maxLength", None)
    if least is not None or most is not None:
        for bound in (least, most):
            if bound is not None and (type(bound) is not int or bound < 0):
                raise ValueError(f"{path}: a length is a whole number (got {bound!r})")
        if most is not None and most < (least or 0):
            raise ValueError(f"{path}: minLength {least} is greater than maxLength {most}")
        schema["pattern"] = f"^{CHARACTER}{{{least or 0},{'' if most is None else most}}}$"
    elif "pattern" in schema:
        _check_regex(schema["pattern"], f"{path}.pattern")
        schema["pattern"] = re.sub("[^\\0-\x7f]", _code_point, schema["pattern"])
    elif schema.get("format") == "email":
        del schema["format"]
        schema["pattern"] = _EMAIL
    return schema


def _code_point(match: re.Match[str]) -> str:
    return f"\\u{{{ord(match[0]):x}}}"


def _check_regex(regex: str, path: str) -> None:
    if _LOOKAROUND.search(regex):
        raise ValueError(f"{path}: lookahead and lookbehind are not supported")


def _check_keywords(schema: dict[str, Any], path: str) -> None:
    """Raises ValueError for keywords that the compiler would ignore, alone or together."""
    for name, kind in _KINDS_OF_VALUES.items():
        if not isinstance(schema.get(name, kind()), kind):
            raise ValueError(f"{path}.{name}: must be {_NAMES[kind]} (got {schema[name]!r:.100})")
    if not all(isinstance(name, str) for name in schema.get("required", ())):
        raise ValueError(f"{path}.required: must be a list of strings")
    names = {name for name in schema if not name.startswith("x-")} - _ANNOTATIONS
    for name in sorted(names - _CONSTRAINTS - _WHOLE):
        raise ValueError(f"{path}: the keyword {name!r} is not supported in a JSON schema")
    whole = sorted(names & _WHOLE)
    if whole and names - {whole[0], "type"}:
        others = ", ".join(sorted(names - {whole[0], "type"}))
        raise ValueError(f"{path}: {whole[0]} cannot be combined with {others}")
    if "allOf" in names and len(schema["allOf"]) > 1:
        raise ValueError(f"{path}.allOf: only one entry is supported; merge them")
    if "$ref" in names and not str(schema["$ref"]).startswith("#"):
        raise ValueError(f"{path}.$ref: only references within the schema, '#/…', are supported")
    if names & _NEED_A_TYPE and "type" not in names:
        raise ValueError(f"{path}.{min(names & _NEED_A_TYPE)}: needs a type beside it")
    if "pattern" in names and names & {"minLength", "maxLength", "format"}:
        raise ValueError(f"{path}: pattern cannot be combined with minLength, maxLength or format")
    if "format" in names and names & {"minLength", "maxLength"}:
        raise ValueError(f"{path}: format cannot be combined with minLength or maxLength")
    if "format" in names and schema["format"] not in _FORMATS:
        known = ", ".join(sorted(_FORMATS))
        raise ValueError(f"{path}.format: {schema['format']!r} is not supported; known: {known}")
    unlisted = set(schema.get("required", ())) - set(schema.get("properties", ()))
    if unlisted:
        raise ValueError(f"{path}.required: {sorted(unlisted)[0]!r} is not among the properties")
