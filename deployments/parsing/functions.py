"""What a parser knows of the functions that may be called."""

from collections.abc import Iterable, Mapping
from typing import Any


class Functions:
    """By name, with their parameters' types. None are known, and all may be called, by default."""

    def __init__(self, functions: Iterable[Mapping[str, Any]] = ()) -> None:
        """
        Args:
            functions: as in the OpenAI API: {name, parameters}.
        """
        self._properties: dict[str, Any] = {}
        for function in functions:
            parameters = function.get("parameters") or {}
            self._properties[function["name"]] = parameters.get("properties") or {}

    def has(self, name: str) -> bool:
        return not self._properties or name in self._properties

    def is_text(self, name: str, parameter: str) -> bool:
        """Whether this parameter is a text, whatever it looks like."""
        properties = self._properties.get(name)
        return isinstance(properties, dict) and _is_text(properties.get(parameter))


def _is_text(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return False
    for several in ("anyOf", "oneOf"):
        if isinstance(schema.get(several), list):
            return all(map(_is_text, schema[several]))
    if isinstance(schema.get("enum"), list):
        return all(isinstance(value, str) for value in schema["enum"])
    return schema.get("type") in ("string", ["string"])


ANY = Functions()
