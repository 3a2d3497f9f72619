"""What a way to write tool calls is made of."""

import re
import secrets
from collections.abc import Mapping
from typing import Any, ClassVar

from deployments.parsing.functions import Functions
from deployments.parsing.json_call import KEYS, CallReader
from deployments.parsing.pieces import CallStart, Piece
from deployments.parsing.source import BLANKS, SPACE, Reading, Source
from engine import json_schema

# A call as text and, between, forms as xgrammar's structural tags have them.
Parts = list[str | dict[str, Any]]
# Characters of white space in a row that arguments may have.
_MAX_WHITESPACE = 8


def arguments_form(function: Mapping[str, Any]) -> dict[str, Any]:
    """The form of a function's arguments; raises ValueError for a schema that can be none."""
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    return {
        "type": "json_schema",
        "json_schema": json_schema.close(schema),
        "max_whitespace_cnt": _MAX_WHITESPACE,
    }


def beginning_of(mark: str) -> str:
    """A regular expression for how the mark begins, matching also what may yet become that."""
    first, second = re.escape(mark[0]), re.escape(mark[1])
    return rf"{first}(?:{second}|\Z)"


class ToolFormat:
    """One way to write tool calls: JSON objects behind a mark.

    A format is a subclass in a file of its own, named in `formats/__init__.py`. One that is not
    JSON overrides `read_marked` or `read_call`.
    """

    name: ClassVar[str]
    trace: ClassVar[str]  # what in a chat template gives the format away
    openers: ClassVar[tuple[str, ...]]  # one or more of them, one after another
    closers: ClassVar[tuple[str, ...]] = ()
    inner_marks: ClassVar[tuple[str, ...]] = ()
    has_channels: ClassVar[bool] = False  # whether all of an output is as harmony has it
    is_bare: ClassVar[bool] = False  # whether an object without an opener may be a call too

    @property
    def prefix(self) -> str:
        """How all calls begin: the prompt ends with it when a call is forced."""
        return "".join(self.openers)

    @property
    def marks(self) -> tuple[str, ...]:
        """All marks, which may be special tokens of a tokenizer."""
        return self.openers + self.inner_marks + self.closers

    def trigger(self, function: str) -> str:
        """The beginning of a call of this function: whatever text has it goes on as a call."""
        return self.openers[0]

    @property
    def first_characters(self) -> str:
        """What calls begin with."""
        return "".join({opener[0] for opener in self.openers}) + ("{" if self.is_bare else "")

    @property
    def beginning(self) -> str:
        """A regular expression for how calls begin, matching also what may yet become that."""
        key = rf'"(?:[a-z]*+\Z|(?:{"|".join(KEYS)})")'
        bare = rf"|\{{[{BLANKS}]*+(?:\Z|{key})"
        return "|".join(map(beginning_of, self.openers)) + (bare if self.is_bare else "")

    def new_id(self, name: str, number: int) -> str:
        """What clients and, in later turns, templates know a call by.

        Args:
            number: of the call in the conversation.
        """
        return f"call_{secrets.token_hex(12)}"

    def read_call(
        self, source: Source, pieces: list[Piece], functions: Functions, index: int, follows: bool
    ) -> Reading[bool]:
        """Reads one call, with its opener; whether it was one. If not, there are no pieces.

        Args:
            pieces: where its pieces are put.
            functions: those that may be called.
            index: its number in the answer.
            follows: it stands right behind another call, and needs no opener.
        """
        is_marked = yield from self._open(source)
        if not (is_marked or follows or self.is_bare):
            return False
        reader = self.reader(source, pieces, functions, index)
        yield from self.read_marked(source, reader) if is_marked else reader.read(strict=True)
        return reader.is_believed

    def reader(
        self, source: Source, pieces: list[Piece], functions: Functions, index: int
    ) -> CallReader:
        """What reads the call of this number in the answer."""
        stops = self.openers + self.closers
        return CallReader(source, pieces, lambda name: CallStart(index, name), stops, functions)

    def read_marked(self, source: Source, reader: CallReader) -> Reading[None]:
        """Reads what follows the opener."""
        yield from source.skip("[")
        yield from source.all_of(SPACE)
        yield from reader.read()

    def _open(self, source: Source) -> Reading[bool]:
        """Takes the openers, also one that is written twice, and the space behind them."""
        is_open = False
        while (yield from source.skip(*self.openers)):
            yield from source.all_of(SPACE)
            is_open = True
        return is_open

    def written(self, function: dict[str, Any]) -> Parts:
        """A call of this function, from its opener on; raises ValueError for a bad schema.

        Args:
            function: as in the OpenAI API: {name, parameters}.
        """
        raise NotImplementedError
