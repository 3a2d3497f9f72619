"""What a way to write tool calls is made of."""

import re
import secrets
from typing import Any, ClassVar

from deployments.parsing.json_call import KEYS, CallReader
from deployments.parsing.pieces import CallStart, Piece
from deployments.parsing.source import BLANKS, SPACE, Reading, Source


def beginning_of(mark: str) -> str:
    """A regular expression for how the mark begins, matching also what may yet become that."""
    first, second = re.escape(mark[0]), re.escape(mark[1])
    return rf"{first}(?:{second}|\Z)"


class ToolFormat:
    """One way to write tool calls: JSON objects behind a mark.

    A format is a subclass in a file of its own, named in `formats/__init__.py`. One that is not
    JSON overrides `read_call` and `forced_form`.
    """

    name: ClassVar[str]
    trace: ClassVar[str]  # what in a chat template gives the format away
    opener: ClassVar[str]
    closer: ClassVar[str | None] = None
    inner_marks: ClassVar[tuple[str, ...]] = ()
    is_bare: ClassVar[bool] = False  # whether an object without an opener may be a call too
    arguments_key: ClassVar[str] = "arguments"
    prefix: ClassVar[str]  # what precedes a call: the prompt ends with it when a call is forced
    is_array: ClassVar[bool] = False  # whether a forced call stands in an array

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks, which may be special tokens of a tokenizer."""
        return (self.opener, *self.inner_marks, *((self.closer,) if self.closer else ()))

    @property
    def first_characters(self) -> str:
        """What calls begin with."""
        return self.opener[0] + ("{" if self.is_bare else "")

    @property
    def beginning(self) -> str:
        """A regular expression for how calls begin, matching also what may yet become that."""
        key = rf'"(?:[a-z]*+\Z|(?:{"|".join(KEYS)})")'
        bare = rf"|\{{[{BLANKS}]*+(?:\Z|{key})"
        return beginning_of(self.opener) + (bare if self.is_bare else "")

    def new_id(self) -> str:
        return f"call_{secrets.token_hex(12)}"

    def read_call(
        self, source: Source, pieces: list[Piece], index: int, follows: bool
    ) -> Reading[bool]:
        """Reads one call, with its opener; whether it was one. If not, there are no pieces.

        Args:
            pieces: where its pieces are put.
            index: its number in the answer.
            follows: it stands right behind another call, and needs no opener.
        """
        is_marked = yield from self._open(source)
        if not (is_marked or follows or self.is_bare):
            return False
        stops = (self.opener, self.closer) if self.closer else (self.opener,)
        reader = CallReader(
            source, pieces, lambda name: CallStart(index, self.new_id(), name), stops
        )
        yield from self.read_marked(source, reader) if is_marked else reader.read(strict=True)
        return reader.is_believed

    def read_marked(self, source: Source, reader: CallReader) -> Reading[None]:
        """Reads what follows the opener."""
        yield from source.skip("[")
        yield from source.all_of(SPACE)
        yield from reader.read()

    def _open(self, source: Source) -> Reading[bool]:
        """Takes the opener, also one that is written twice, and the space behind it."""
        is_open = False
        while (yield from source.skip(self.opener)):
            yield from source.all_of(SPACE)
            is_open = True
        return is_open

    def forced_form(self, tools: list[dict[str, Any]]) -> dict[str, Any]:
        """What must follow `prefix`, as `StructuredOutputs` takes it: one call of these tools.

        Args:
            tools: functions as in the OpenAI API: {name, description, parameters}.
        """
        return {"json": self._forced_schema(tools), "disable_any_whitespace": True}

    def _forced_schema(self, tools: list[dict[str, Any]]) -> dict[str, Any]:
        calls = []
        for tool in tools:
            parameters = tool.get("parameters") or {"type": "object", "properties": {}}
            calls.append(
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": tool["name"]},
                        # The $id keeps references within the parameters.
                        self.arguments_key: parameters | {"$id": tool["name"]},
                    },
                    "required": ["name", self.arguments_key],
                    "additionalProperties": False,
                }
            )
        call: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
        if self.is_array:
            call = {"type": "array", "items": call, "minItems": 1, "maxItems": 1}
        return call
