"""Texts that a tokenizer reads as control tokens, where they are only text."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

# So much is searched at a time: other threads get their turn in between.
_WINDOW = 1 << 16
_PRIVATE_USE = re.compile("[\ue000-\uf8ff]")


class ControlTokens:
    """Finds the texts of some tokens in strings, and cuts them there so that they are no tokens."""

    def __init__(self, tokens: Iterable[str]) -> None:
        rests = defaultdict(list)
        for token in tokens:
            rests[token[0]].append(token[1:])
        self._longest = max((len(rest) for group in rests.values() for rest in group), default=0)
        # One for each first letter: that is quickly searched for.
        self._patterns = [re.compile(f"{re.escape(c)}(?={_any_of(r)})") for c, r in rests.items()]

    def are_in(self, text: str) -> bool:
        return any(self._starts(text, begin) for begin in range(0, len(text), _WINDOW))

    def cut(self, value: Any, mark: str) -> Any:
        """A copy of a JSON value with this mark behind the first letter of each token."""
        match value:
            case str():
                begins = range(0, len(value), _WINDOW)
                return "".join(self._cut_window(value, begin, mark) for begin in begins)
            case dict():
                return {self.cut(k, mark): self.cut(v, mark) for k, v in value.items()}
            case list() | tuple():
                return [self.cut(item, mark) for item in value]
        return value

    def _cut_window(self, text: str, begin: int, mark: str) -> str:
        last = min(begin + _WINDOW, len(text)) - 1
        bounds = [begin - 1, *self._starts(text, begin), last]
        return mark.join(text[i + 1 : j + 1] for i, j in pairwise(bounds))

    def _starts(self, text: str, begin: int) -> list[int]:
        """Where tokens begin in a window of the text, also within each other."""
        end = begin + _WINDOW
        return sorted(
            match.start()
            for pattern in self._patterns
            for match in pattern.finditer(text, begin, end + self._longest)
            if match.start() < end
        )


def _any_of(words: list[str]) -> str:
    """A regular expression that matches any of these words, or a shorter beginning of one."""
    if "" in words:
        return ""
    rests = defaultdict(list)
    for word in words:
        rests[word[0]].append(word[1:])
    return "(?:" + "|".join(re.escape(c) + _any_of(rest) for c, rest in rests.items()) + ")"


def strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, keys too."""
    match value:
        case str():
            yield value
        case dict():
            for key, item in value.items():
                yield from strings(key)
                yield from strings(item)
        case list() | tuple():
            for item in value:
                yield from strings(item)


def unused_character(text: str) -> str:
    """One for private use that a text does not have; raises ValueError when it has all."""
    begins = range(0, len(text), _WINDOW)
    used = {c for begin in begins for c in _PRIVATE_USE.findall(text, begin, begin + _WINDOW)}
    return min(set(map(chr, range(0xE000, 0xF900))) - used)
