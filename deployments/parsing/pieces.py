"""What the parsers cut a text into, and the care that all of them take at its edges."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A part of the JSON text of call `index`'s arguments."""

    index: int
    text: str


Piece = Content | Reasoning | CallStart | Arguments


def split_at(text: str, mark: str) -> tuple[str, str | None]:
    """(what certainly precedes the mark, what follows it): None while the mark is not there.

    Without the mark, the first part is the text up to where the mark may have begun, so the caller
    keeps the rest of it: `text[len(first):]`.
    """
    index = text.find(mark)
    if index >= 0:
        return text[:index], text[index + len(mark) :]
    for length in range(min(len(text), len(mark) - 1), 0, -1):
        if text.endswith(mark[:length]):
            return text[:-length], None
    return text, None


def may_become(text: str, mark: str) -> bool:
    """Whether the text is a beginning of the mark, or nothing yet."""
    return len(text) < len(mark) and mark.startswith(text)
