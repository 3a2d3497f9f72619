"""Prompt lookup: a text goes on as it did when it last said the same.

After Saxena, "Prompt lookup decoding", 2023.
"""

from engine.schedule.sequence import Sequence
from engine.speculation.drafter import Draft, Drafter
from engine.speculation.texts import TextIndex


class NgramDrafter(Drafter):
    name = "ngram"

    def __init__(self) -> None:
        self._own: dict[str, TextIndex] = {}

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        index = self._own.setdefault(sequence.id, TextIndex(sequence.token_ids))
        index.catch_up()
        return index.draft(sequence.token_ids, limit)

    def end(self, sequence: Sequence) -> None:
        self._own.pop(sequence.id, None)
