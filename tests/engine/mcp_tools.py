"""Parameters of tools as the generators of several languages write them."""

from typing import Any

_DRAFT_7 = "http://json-schema.org/draft-07/schema#"
_2020 = "https://json-schema.org/draft/2020-12/schema"
_NOTHING: dict[str, Any] = {"not": {}}

MCP_TOOLS: dict[str, dict[str, Any]] = {
    "pydantic": {
        "title": "Fetch",
        "type": "object",
        "properties": {
            "url": {"format": "uri", "maxLength": 2083, "minLength": 1, "type": "string"},
            "max_length": {
                "default": 5000,
                "exclusiveMaximum": 1000000,
                "exclusiveMinimum": 0,
                "title": "Max Length",
                "type": "integer",
            },
            "since": {"anyOf": [{"format": "date-time", "type": "string"}, {"type": "null"}]},
            "raw": {"default": False, "type": "boolean"},
        },
        "required": ["url"],
    },
    "zod 3": {
        "$schema": _DRAFT_7,
        "type": "object",
        "properties": {
            "mode": {"type": "string", "enum": ["a", "b"], "default": "a"},
            "edit": {
                "type": "array",
                "items": [{"type": "number"}, {"type": "number"}],
                "minItems": 2,
                "maxItems": 2,
            },
            "value": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
            "same": {"$ref": "#/properties/value/anyOf/0"},
        },
        "required": ["mode", "edit"],
        "additionalProperties": False,
    },
    "zod 4": {
        "$schema": _2020,
        "type": "object",
        "properties": {
            "counts": {
                "type": "object",
                "propertyNames": {"type": "string"},
                "additionalProperties": {
                    "type": "integer",
                    "minimum": -9007199254740991,
                    "maximum": 9007199254740991,
                },
            },
            "tree": {"$ref": "#/$defs/__schema0"},
        },
        "required": ["counts"],
        "additionalProperties": False,
        "$defs": {
            "__schema0": {
                "type": "object",
                "properties": {"next": {"$ref": "#/$defs/__schema0"}},
                "additionalProperties": False,
            }
        },
    },
    "Rust, schemars": {
        "$schema": _2020,
        "title": "Request",
        "type": "object",
        "properties": {
            "a": {"type": "integer", "format": "int32"},
            "n": {"type": ["integer", "null"], "format": "uint", "minimum": 0},
            "ratio": {"type": "number", "format": "double"},
            "kind": {"$ref": "#/$defs/Kind<Of>"},
            "at": {"anyOf": [{"$ref": "#/$defs/Point"}, {"type": "null"}]},
        },
        "required": ["a"],
        "$defs": {
            "Kind<Of>": {
                "oneOf": [
                    {"description": "The first.", "type": "string", "const": "one"},
                    {"type": "string", "enum": ["two", "three"]},
                ]
            },
            "Point": {
                "type": "object",
                "properties": {
                    "x": {"type": "integer", "format": "uint8", "minimum": 0, "maximum": 255},
                    "y": {
                        "type": "integer",
                        "format": "uint64",
                        "minimum": 0,
                        "maximum": 18446744073709551615,
                    },
                },
                "required": ["x"],
            },
        },
    },
    "Go": {
        "type": "object",
        "properties": {
            "ids": {"type": ["null", "array"], "items": {"type": "integer"}},
            "perPage": {"type": "number", "minimum": 1, "maximum": 100},
            "nothing": {"type": "object", "additionalProperties": _NOTHING},
        },
        "required": ["ids"],
        "additionalProperties": _NOTHING,
    },
    "C#": {
        "type": "object",
        "properties": {
            "count": {"type": ["string", "integer"], "pattern": r"^-?(?:0|[1-9]\d*)$"},
            "next": {"type": ["object", "null"], "properties": {"id": {"type": "integer"}}},
            "last": {"$ref": "#/properties/next"},
        },
        "required": ["count"],
    },
    "a tree, and a parameter called definitions": {
        "type": "object",
        "properties": {
            "definitions": {"type": "array", "items": {"$ref": "#/definitions/Day"}},
            "children": {"type": "array", "items": {"$ref": "#"}, "maxItems": 1},
        },
        "required": ["definitions"],
        "definitions": {"Day": {"type": "string", "format": "date"}},
    },
}
