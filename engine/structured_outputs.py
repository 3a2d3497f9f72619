"""What form an output must have, and which forms are refused before anything is compiled.

Imports no torch: a front checks this at its door. What only a compiler can find wrong, such as a
regular expression's syntax, `engine.sampling.grammar.compiler` reports.
"""

import json
from functools import cached_property
from typing import Any

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from engine import json_schema, patterns

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
_MAX_CHARACTERS = 100_000


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
            patterns.check_regex(self.regex, "regex")
        return self

    @cached_property
    def key(self) -> str:
        """Equal constraints have equal keys."""
        return json.dumps([self.disable_any_whitespace, *(getattr(self, name) for name in _KINDS)])

    def closed_schema(self) -> dict[str, Any]:
        """The JSON schema as the compiler takes it; raises what `engine.json_schema.close` does."""
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
        return json_schema.close(schema)
