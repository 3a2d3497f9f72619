"""Prompt lookup: a text goes on as it did when it last said the same.

After Saxena, "Prompt lookup decoding", 2023.
"""

from collections.abc import Iterable

from engine.schedule.sequence import Sequence
from engine.speculation.drafter import Draft, Drafter
from engine.speculation.texts import Match, TextIndex


class NgramDrafter(Drafter):
    name = "ngram"

    def __init__(self) -> None:
        self._matches: dict[Sequence, Match] = {}

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        match = self._matches.get(sequence)
        if match is None:
            text = sequence.token_ids
            match = self._matches[sequence] = Match(text, TextIndex(text))
        return match.draft(limit, self._others(sequence))

    def _others(self, sequence: Sequence) -> Iterable[TextIndex]:
        """Texts that it may go on like, beside its own."""
        return ()

    def end(self, sequence: Sequence) -> None:
        self._matches.pop(sequence, None)
