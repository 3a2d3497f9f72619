"""Random JSON schemas of everything that is supported, whose instances a random model ends writing.

Strings, arrays and numbers are bounded: a model that does not know what it says would go on.
"""

import random
from typing import Any

_PATTERNS = [
    r"^[a-z]{2,5}$",
    r"^\d{3}-\d{2}$",
    r"^(foo|bar)[0-9]?$",
    r"^[A-F0-9]{4}$",
    r"^[^a]{1,4}$",
    r"^[é日]\.?$",
]
_FORMATS = ["date", "date-time", "ipv4", "uuid"]
# Of no meaning to JSON Schema: what tools of other languages note beside a type.
_NOTES = ["int32", "int64", "uint", "uint8", "float", "double", "password", "binary", "date"]
_VALUES: list[Any] = ["red", 'a "quoted" word', "日本", 7, -2.5, True, None, [1, "x"], {"k": 0}]
_VALUES += [2**63 - 1, -(2**63), 1.0, 1e22, 0.1]
_KINDS = ["string", "integer", "number", "boolean", "null", "array", "object"]


def random_schema(seed: int) -> dict[str, Any]:
    """An object, as APIs want it; one seed, one schema."""
    return _Generator(random.Random(seed)).root()


class _Generator:
    def __init__(self, choose: random.Random) -> None:
        self._choose = choose
        self._definitions: dict[str, Any] = {}

    def root(self) -> dict[str, Any]:
        schema = self._object(depth=3)
        return schema | ({"$defs": self._definitions} if self._definitions else {})

    def _any(self, depth: int) -> dict[str, Any]:
        leaves = [self._string, self._integer, self._number, self._enum, self._const, self._plain]
        if depth > 0 and self._choose.random() < 0.5:
            return self._choose.choice(
                [
                    *(self._object, self._array, self._tuple, self._any_of, self._reference),
                    self._typed_any_of,
                ]
            )(depth - 1)
        return self._choose.choice(leaves)()

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._choose.sample(["a", "name", "two words", 'q"', "日", "$x", "list"], k=3)
        names = names[: self._choose.randint(1, 3)]
        schema = {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": self._choose.sample(names, k=self._choose.randint(0, len(names))),
        }
        return schema | ({"title": "T"} if self._choose.random() < 0.2 else {})

    def _array(self, depth: int) -> dict[str, Any]:
        least = self._choose.randint(0, 2)
        most = least + self._choose.randint(0, 2)
        return {"type": "array", "items": self._any(depth), "minItems": least, "maxItems": most}

    def _tuple(self, depth: int) -> dict[str, Any]:
        items = [self._any(depth) for _ in range(self._choose.randint(1, 2))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self._any(depth), self._any(0)]}

    def _typed_any_of(self, depth: int) -> dict[str, Any]:
        """What contradicts the type is no way to go."""
        way = {"anyOf": [self._enum(), self._integer(), self._number(), self._array(0)]}
        return way | {"type": self._choose.choice(["number", "integer", ["array", "integer"]])}

    def _reference(self, depth: int) -> dict[str, Any]:
        name = self._choose.choice(["d", "a/b", "List<int>", "~", "50%"]) + str(
            len(self._definitions)
        )
        self._definitions[name] = {}  # it has its name before those within it
        self._definitions[name] = self._any(depth)
        pointer = name.replace("~", "~0").replace("/", "~1").replace("%", "%25")
        return {"$ref": f"#/$defs/{pointer}", "description": "said elsewhere"}

    def _string(self) -> dict[str, Any]:
        kind = self._choose.randint(0, 2)
        if kind == 0:
            return {"type": "string", "pattern": self._choose.choice(_PATTERNS)}
        if kind == 1:
            return {"type": "string", "format": self._choose.choice(_FORMATS)}
        least = self._choose.randint(0, 4)
        return {
            "type": self._choose.choice(["string", ["string", "null"]]),
            "minLength": least,
            "maxLength": least + self._choose.randint(0, 6),
        }

    def _integer(self) -> dict[str, Any]:
        least = self._choose.randint(-1000, 1000)
        name = self._choose.choice(["minimum", "exclusiveMinimum"])
        most = self._choose.choice([least + self._choose.randint(2, 500), 2**64 - 1])
        fraction = self._choose.choice([0, 0, 0.5])
        schema = {"type": "integer", name: least + fraction, "maximum": most - fraction}
        return schema | self._note()

    def _number(self) -> dict[str, Any]:
        least = self._choose.randint(-50, 50)
        return {
            "type": "number",
            "exclusiveMinimum": least,
            "maximum": least + self._choose.randint(1, 9) + 0.5,
        } | self._note()

    def _note(self) -> dict[str, Any]:
        return {"format": self._choose.choice(_NOTES)} if self._choose.random() < 0.3 else {}

    def _enum(self) -> dict[str, Any]:
        values = self._choose.sample(_VALUES, k=self._choose.randint(1, 4))
        if self._choose.random() < 0.5:
            return {"enum": values}
        kind = self._choose.choice(_KINDS)
        fitting = {"string": "red", "boolean": True, "null": None, "array": [], "object": {}}
        return {"type": kind, "enum": [*values, fitting.get(kind, 7)]}

    def _const(self) -> dict[str, Any]:
        return {"const": self._choose.choice(_VALUES)}

    def _plain(self) -> dict[str, Any]:
        kinds = self._choose.sample(["boolean", "null"], k=self._choose.randint(1, 2))
        return {"type": kinds if len(kinds) > 1 else kinds[0]}
