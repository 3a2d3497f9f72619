"""What the parsers cut a text into: one per token, and to make a frozen one would cost double."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby


@dataclass(slots=True)
class Content:
    text: str


@dataclass(slots=True)
class Reasoning:
    text: str


@dataclass(slots=True)
class CallStart:
    """A tool call begins; its arguments follow."""

    index: int
    name: str
    id: str = ""  # given where it leaves the parser


@dataclass(slots=True)
class Arguments:
    """A part of the JSON text of call `index`'s arguments."""

    index: int
    text: str


TextPiece = Content | Reasoning | Arguments
Piece = TextPiece | CallStart


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """The same with neighbours of one kind in one piece, and no empty ones."""
    if len(pieces) == 1:  # nearly always
        return [piece for piece in pieces if isinstance(piece, CallStart) or piece.text]
    result: list[Piece] = []
    for _, group in groupby(pieces, type):
        neighbours = list(group)
        texts = [piece for piece in neighbours if not isinstance(piece, CallStart)]
        if not texts:
            result += neighbours
        elif text := "".join(piece.text for piece in texts):
            result.append(replace(texts[0], text=text))
    return result
