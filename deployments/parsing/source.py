"""An output's text, read from front to back as if all of it were there already."""

import re
from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
# What reads a text that is still being written: it yields wherever it cannot go on without more.
Reading = Generator[None, None, T]

BLANKS = " \t\r\n"
SPACE = re.compile(f"[{BLANKS}]+")
NEWLINES = re.compile(r"\n+")
CHARACTER = re.compile(r".", re.DOTALL)
_ANY_NUMBER = 2**31


class Source:
    """The text of an output as it comes.

    Whoever reads it learns nothing of the pieces in which it comes: a question waits until the text
    decides it, or has ended. So what is read is a function of the text alone. And nothing is read
    twice but what a question waits for, which is no longer than a mark.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # how much of it has been taken
        self._taken: list[str] = []
        self.num_taken = 0  # characters, in all
        self._is_complete = False

    def add(self, text: str, last: bool) -> None:
        self._text, self._at = self._text[self._at :] + text, 0
        self._is_complete = last

    @property
    def num_waiting(self) -> int:
        """Characters that have come and are not taken."""
        return len(self._text) - self._at

    def taken(self, but: str = "") -> str:
        """All that was taken since this was last asked, but for these characters at its end."""
        text = "".join(self._taken)
        said = text.rstrip(but)
        self._taken = [text[len(said) :]] if len(said) < len(text) else []
        return said

    def more(self) -> Reading[bool]:
        """Whether the text goes on."""
        while self._at == len(self._text):
            if self._is_complete:
                return False
            yield
        return True

    def sees(self, *marks: str) -> Reading[bool]:
        """Whether the text goes on with one of these marks."""
        return bool((yield from self._next(marks)))

    def skip(self, *marks: str) -> Reading[bool]:
        """Takes one of these marks, if the text goes on with it."""
        mark = yield from self._next(marks)
        self._take(self._at + len(mark))
        return bool(mark)

    def _next(self, marks: tuple[str, ...]) -> Reading[str]:
        """The first of the marks that the text goes on with, or ""."""
        for mark in marks:
            while not self._text.startswith(mark, self._at):
                rest = self._text[self._at : self._at + len(mark)]
                if self._is_complete or not mark.startswith(rest):
                    break
                yield
            else:
                return mark
        return ""

    def take(self, run: re.Pattern[str], at_most: int = _ANY_NUMBER) -> str:
        """Takes what is there of a run: of a pattern that matches each part of what it matches."""
        match = run.match(self._text, self._at, self._at + at_most)
        return self._take(match.end()) if match else ""

    def take_up_to(self, find: Callable[[str, int], int]) -> str:
        """Takes up to the index that is found in (text, from index)."""
        return self._take(find(self._text, self._at))

    def all_of(self, run: re.Pattern[str], at_most: int = _ANY_NUMBER) -> Reading[str]:
        """Takes a run to its end, or so many characters of it."""
        parts: list[str] = []
        while at_most and (yield from self.more()) and (part := self.take(run, at_most)):
            parts.append(part)
            at_most -= len(part)
        return "".join(parts)

    def _take(self, end: int) -> str:
        text = self._text[self._at : end]
        self._at = end
        self.num_taken += len(text)
        if text:
            self._taken.append(text)
        return text
