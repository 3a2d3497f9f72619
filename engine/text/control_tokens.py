"""Texts that a tokenizer reads as control tokens, where they are only text."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

# So much is searched at a time: other threads get their turn in between.
_WINDOW = 1 << 16
_PRIVATE_USE = frozenset(map(chr, range(0xE000, 0xF900)))


class ControlTokens:
    """Finds the texts of some tokens in strings, and cuts them there so that they are no tokens."""

    def __init__(self, tokens: Iterable[str]) -> None:
        rests = defaultdict(list)
        for token in tokens:
            rests[token[0]].append(token[1:])
        self._longest = max((len(rest) for group in rests.values() for rest in group), default=0)
        # One for each first letter: that is quickly searched for.
        self._patterns = [re.compile(f"{re.escape(c)}(?={_any_of(r)})") for c, r in rests.items()]

    def starts(self, text: str) -> list[int]:
        """Where tokens begin in the text, also within each other."""
        return sorted(
            match.start()
            for begin in range(0, len(text), _WINDOW)
            for pattern in self._patterns
            for match in pattern.finditer(text, begin, begin + _WINDOW + self._longest)
            if match.start() < begin + _WINDOW
        )

    def cut(self, value: Any, mark: str) -> Any:
        """A copy of a JSON value with this mark behind the first letter of each token."""
        match value:
            case str():
                bounds = [-1, *self.starts(value), len(value)]
                return mark.join(value[i + 1 : j + 1] for i, j in pairwise(bounds))
            case dict():
                return {self.cut(k, mark): self.cut(v, mark) for k, v in value.items()}
            case list() | tuple():
                return [self.cut(item, mark) for item in value]
        return value


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


def unused_character(texts: Iterable[str]) -> str:
    """One that none of them has, and no template. Raises ValueError when all are taken."""
    return min(_PRIVATE_USE.difference(*texts))
