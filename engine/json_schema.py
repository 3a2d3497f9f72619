"""JSON schemas for the grammar compiler, which ignores what it does not know.

What it would ignore or mistake is respelled here, or refused by name. A respelled schema has only
instances of the original, though not always all of them.
"""

import math
from typing import Any, NamedTuple
from urllib.parse import unquote

from engine import patterns

_MAX_DEPTH = 64
_MAX_PARTS = 10_000  # what is referred to counts again for each kind of place that refers to it
_MAX_INTEGER = 2**63 - 1  # larger ones would be written as floats

_ANNOTATIONS = {
    *("$schema", "$id", "id", "$anchor", "$comment", "$defs", "definitions", "title", "default"),
    *("description", "examples", "example", "deprecated", "readOnly", "writeOnly", "enumNames"),
    *("contentEncoding", "contentMediaType", "contentSchema", "discriminator", "externalDocs"),
    "xml",
}
_OF_STRINGS = {"minLength", "maxLength", "pattern", "format"}
_OF_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
_NEED_A_TYPE = _OF_STRINGS | _OF_NUMBERS | {"minItems", "maxItems"}
_KEYWORDS = _NEED_A_TYPE | {
    *("properties", "required", "additionalProperties", "items", "prefixItems"),
}
_WHOLE = {"enum", "const", "anyOf", "oneOf", "allOf", "$ref"}  # each says everything by itself
# Keywords that are not supported, with the values by which they constrain nothing.
_IDLE: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "minProperties": (0,),
    "patternProperties": ({},),
    "propertyNames": ({"type": "string"}, {}, True),
}
_KINDS_OF_VALUES: dict[str, type] = {
    "properties": dict,
    **dict.fromkeys(("required", "prefixItems", "enum", "anyOf", "oneOf", "allOf"), list),
    **dict.fromkeys(("pattern", "format", "$ref"), str),
}
_NAMES: dict[type, str] = {dict: "an object", list: "a list", str: "a string"}
_FORMATS = {
    *("email", "date", "time", "date-time", "duration", "ipv4", "ipv6", "hostname", "uuid", "uri"),
    *("uri-reference", "uri-template"),
}
# JSON Schema's others. What is not JSON Schema's, as int32 or password, constrains nothing.
_OTHER_FORMATS = {
    *("regex", "json-pointer", "relative-json-pointer"),
    *("iri", "iri-reference", "idn-email", "idn-hostname"),
}
_TYPES = ("array", "boolean", "integer", "null", "number", "object", "string")
_Types = list[str] | None  # None is any


def close(schema: dict[str, Any]) -> dict[str, Any]:
    """What the schema constrains, in the compiler's words.

    Objects that list properties have no others unless it says so: that is stricter than JSON
    Schema's own default, and what OpenAI and vLLM do. Raises ValueError naming what is not
    supported, rather than ignoring it.
    """
    return _Closer().close(schema)


class _NoInstanceError(ValueError):
    """No value could be an instance."""


class _Place(NamedTuple):
    """Where a part of a schema stands."""

    path: str
    depth: int
    base: dict[str, Any]  # the innermost schema around it with an $id: references begin there
    base_path: str

    def at(self, name: str) -> "_Place":
        return self._replace(path=f"{self.path}.{name}", depth=self.depth + 1)

    def entering(self, schema: Any) -> "_Place":
        """The same, if this schema stands there."""
        has_id = isinstance(schema, dict) and not str(schema.get("$id", "#")).startswith("#")
        return self._replace(base=schema, base_path=self.path) if has_id else self


class _Closer:
    def __init__(self) -> None:
        self._num_parts = 0
        # Of what is referred to: its name, by base, reference, and the types that are allowed.
        self._names: dict[tuple[int, str, str], str] = {}
        self._unread: list[tuple[str, Any, _Place, _Types]] = []

    def close(self, schema: dict[str, Any]) -> dict[str, Any]:
        closed = self._close(schema, _Place("json", 0, schema, "json"))
        definitions = {}
        while self._unread:
            name, target, place, types = self._unread.pop()
            definitions[name] = self._close(target, place, types)
        return closed | ({"$defs": definitions} if definitions else {})

    def _close(self, schema: Any, place: _Place, allowed: _Types = None) -> Any:
        """
        Args:
            allowed: types that the schema around this one leaves.
        """
        self._num_parts += 1
        if place.depth > _MAX_DEPTH:
            raise ValueError(f"json: the schema is nested too deeply; at most {_MAX_DEPTH} levels")
        if self._num_parts > _MAX_PARTS:
            raise ValueError(f"json: the schema is too large; at most {_MAX_PARTS} parts")
        if isinstance(schema, bool):
            return {"type": allowed} if schema and allowed else schema
        path, place = place.path, place.entering(schema)
        if not isinstance(schema, dict):
            raise ValueError(f"{path}: a schema is an object or a boolean (got {schema!r:.100})")
        schema = _constraints(schema)
        types = _meet(_types(schema.pop("type", None), path), allowed, path)
        _respell_format(schema, types)
        _check_keywords(schema, types, path)
        for name in ("anyOf", "oneOf", "allOf"):
            if name in schema:
                return {name: self._branches(name, schema[name], place, types)}
        if "$ref" in schema:
            return self._refer(schema["$ref"], place, types)
        if "enum" in schema:
            return {"enum": _values(schema["enum"], types, f"{path}.enum")}
        if "const" in schema:
            return {"const": _values([schema["const"]], types, f"{path}.const")[0]}
        if types is not None:
            schema["type"] = types
        _respell_bounds(schema, types, path)
        _respell_string(schema, path)
        self._close_parts(schema, place)
        return schema

    def _close_parts(self, schema: dict[str, Any], place: _Place) -> None:
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
            schema["properties"] = {
                name: self._close(value, place.at(f"properties.{name}"))
                for name, value in schema["properties"].items()
            }
        if "prefixItems" in schema:
            schema["prefixItems"] = [
                self._close(item, place.at(f"prefixItems.{i}"))
                for i, item in enumerate(schema["prefixItems"])
            ]
        for name in ("items", "additionalProperties"):
            if name in schema:  # {"not": {}} is how Go and zod write false
                part = schema[name] if schema[name] != {"not": {}} else False
                schema[name] = self._close(part, place.at(name))

    def _branches(self, name: str, schemas: list[Any], place: _Place, allowed: _Types) -> list[Any]:
        """Those that can have an instance."""
        closed: list[Any] = []
        failure: _NoInstanceError | None = None
        for i, schema in enumerate(schemas):
            try:
                closed.append(self._close(schema, place.at(f"{name}.{i}"), allowed))
            except _NoInstanceError as error:
                failure = error
        if failure is not None and not closed:
            raise failure
        return closed

    def _refer(self, ref: str, place: _Place, allowed: _Types) -> dict[str, Any]:
        """A reference to a definition of our own, which is closed later."""
        key = id(place.base), ref, repr(allowed)
        if key not in self._names:
            target, found = _resolve(ref, place)
            if isinstance(target, dict):
                _meet(_types(_constraints(target).get("type"), found.path), allowed, found.path)
            self._names[key] = str(len(self._names))
            self._unread.append((self._names[key], target, found, allowed))
        return {"$ref": f"#/$defs/{self._names[key]}"}


def _resolve(ref: str, place: _Place) -> tuple[Any, _Place]:
    """What a reference, a JSON pointer from the base, refers to."""
    path = f"{place.path}.$ref"
    if ref != "#" and not ref.startswith("#/"):
        raise ValueError(f"{path}: only references within the schema, '#/…', are supported")
    target: Any = place.base
    found = place._replace(path=place.base_path, depth=0)
    for part in ref.split("/")[1:]:
        key: Any = part
        if isinstance(target, list) and part.isdecimal():
            key = int(part) if int(part) < len(target) else None
        elif isinstance(target, dict) and part not in target:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
        try:
            target = target[key]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: there is no {ref!r} in the schema") from error
        found = found._replace(path=f"{found.path}.{part}").entering(target)
    return target, found


def _constraints(schema: dict[str, Any]) -> dict[str, Any]:
    """What in it constrains values, as the newest JSON Schema says it."""
    kept = {
        name: value
        for name, value in schema.items()
        if name not in _ANNOTATIONS and not name.startswith("x-")
        if value is not None or name == "const"
        if not any(value == idle and type(value) is type(idle) for idle in _IDLE.get(name, ()))
    }
    # OpenAPI 3.0: null beside the type that stands there. (An enum has to list it, too.)
    if kept.pop("nullable", False) is True and "type" in kept:
        types = kept["type"] if isinstance(kept["type"], list) else [kept["type"]]
        kept["type"] = types if "null" in types else [*types, "null"]
    # Draft 4 and OpenAPI 3.0: a flag beside the limit.
    for name, limit in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if isinstance(kept.get(name), bool) and kept.pop(name) and limit in kept:
            kept[name] = kept.pop(limit)
    # Before 2020: a list for the first items, and another word for the rest.
    rest = kept.pop("additionalItems", True)
    if isinstance(kept.get("items"), list):
        kept["prefixItems"], kept["items"] = kept["items"], rest
    return kept


def _types(given: Any, path: str) -> _Types:
    if given is None:
        return None
    names = given if isinstance(given, list) else [given]
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}.type: must be a type's name or a list of them (got {given!r})")
    for name in names:
        if name not in _TYPES:
            known = ", ".join(_TYPES)
            raise ValueError(f"{path}.type: {name!r:.100} is no type of JSON, which are {known}")
    return [name for name in names if name != "integer" or "number" not in names]


def _meet(own: _Types, allowed: _Types, path: str) -> _Types:
    """The types that both have."""
    if own is None or allowed is None:
        return allowed if own is None else own
    both = [name for name in own if name in allowed or (name == "integer" and "number" in allowed)]
    both += ["integer"] * ("number" in own and "integer" in allowed)
    if not both:
        raise _NoInstanceError(
            f"{path}.type: {' or '.join(own)} contradicts what stands around it: "
            f"{' or '.join(allowed)}"
        )
    return both


def _values(values: list[Any], types: _Types, path: str) -> list[Any]:
    """Those of them that have one of the types."""
    fitting = [value for value in values if types is None or _has_type(value, types)]
    if not fitting:
        raise _NoInstanceError(f"{path}: no value of type {' or '.join(types or ())}")
    _check_numbers(fitting, path)
    return fitting


def _has_type(value: Any, types: list[str]) -> bool:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "number" in types or ("integer" in types and value == int(value))
    kinds = {bool: "boolean", str: "string", dict: "object", list: "array", type(None): "null"}
    return kinds[type(value)] in types


def _check_numbers(value: Any, path: str) -> None:
    """Raises ValueError where there is one that the compiler could not write as it is."""
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            _check_numbers(part, path)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}: {value} is not a number of JSON")
    elif isinstance(value, int) and not -_MAX_INTEGER - 1 <= value <= _MAX_INTEGER:
        raise ValueError(f"{path}: integers of more than 64 bits are not supported (got {value})")


def _respell_format(schema: dict[str, Any], types: _Types) -> None:
    """Leaves a string's format that constrains, without a minLength that it has anyway."""
    name = schema.get("format")
    is_string = types is None or "string" in types
    if not is_string or (isinstance(name, str) and name not in _FORMATS | _OTHER_FORMATS):
        schema.pop("format", None)
        return
    if schema.get("minLength") in (0, 1) and name not in (None, "uri-reference", "uri-template"):
        del schema["minLength"]
    most = schema.get("maxLength")
    if name == "uri" and type(most) is int and most >= patterns.LONGEST_ORIGIN:
        del schema["format"], schema["maxLength"]
        schema["pattern"] = patterns.url_of_at_most(most)


def _respell_bounds(schema: dict[str, Any], types: _Types, path: str) -> None:
    """Whole numbers for integers, and of no more bits than there are."""
    for name in _OF_NUMBERS & schema.keys():
        if type(schema[name]) not in (int, float) or not math.isfinite(schema[name]):
            raise ValueError(f"{path}.{name}: must be a number (got {schema[name]!r:.100})")
    if types is None or "integer" not in types:
        return
    lows, highs = [-_MAX_INTEGER - 1], [_MAX_INTEGER]
    if "minimum" in schema:
        lows.append(math.ceil(schema.pop("minimum")))
    if "exclusiveMinimum" in schema:
        lows.append(math.floor(schema.pop("exclusiveMinimum")) + 1)
    if "maximum" in schema:
        highs.append(math.floor(schema.pop("maximum")))
    if "exclusiveMaximum" in schema:
        highs.append(math.ceil(schema.pop("exclusiveMaximum")) - 1)
    if max(lows) > min(highs):
        raise ValueError(f"{path}: there is no integer of 64 bits from {max(lows)} to {min(highs)}")
    if len(lows) > 1:
        schema["minimum"] = max(lows)
    if len(highs) > 1:
        schema["maximum"] = min(highs)


def _respell_string(schema: dict[str, Any], path: str) -> None:
    """A string's rules as a pattern where the compiler would else allow more than they do."""
    least, most = schema.pop("minLength", None), schema.pop("maxLength", None)
    if least is not None or most is not None:
        for bound in (least, most):
            if bound is not None and (type(bound) is not int or bound < 0):
                raise ValueError(f"{path}: a length is a whole number (got {bound!r})")
        if most is not None and most < (least or 0):
            raise ValueError(f"{path}: minLength {least} is greater than maxLength {most}")
        schema["pattern"] = patterns.of_length(least or 0, most)
        return
    if schema.get("format") in patterns.OF_FORMATS:
        schema["pattern"] = patterns.OF_FORMATS[schema.pop("format")]
    if "pattern" in schema:
        schema["pattern"] = patterns.of_string(schema["pattern"], f"{path}.pattern")


def _check_keywords(schema: dict[str, Any], types: _Types, path: str) -> None:
    """Raises ValueError for keywords that the compiler would ignore, alone or together."""
    for name, kind in _KINDS_OF_VALUES.items():
        if not isinstance(schema.get(name, kind()), kind):
            raise ValueError(f"{path}.{name}: must be {_NAMES[kind]} (got {schema[name]!r:.100})")
    if not all(isinstance(name, str) for name in schema.get("required", ())):
        raise ValueError(f"{path}.required: must be a list of strings")
    names = set(schema)
    for name in sorted(names - _KEYWORDS - _WHOLE):
        raise ValueError(f"{path}: the keyword {name!r} is not supported in a JSON schema")
    whole = sorted(names & _WHOLE)
    if whole and len(names) > 1:
        others = ", ".join(sorted(names - {whole[0]}))
        raise ValueError(f"{path}: {whole[0]} cannot be combined with {others}")
    for name in ("enum", "anyOf", "oneOf", "allOf", "prefixItems"):
        if schema.get(name) == []:
            raise ValueError(f"{path}.{name}: must not be empty")
    if len(schema.get("allOf", ())) > 1:
        raise ValueError(f"{path}.allOf: only one entry is supported; merge them")
    if names & _NEED_A_TYPE and types is None:
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
