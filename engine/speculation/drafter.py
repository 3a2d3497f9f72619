"""Who guesses how a text goes on: one interface. A kind of drafter is a file here."""

from dataclasses import dataclass, field
from typing import Protocol

from engine.schedule.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens that may come next."""

    token_ids: list[int] = field(default_factory=list)
    # How sure each is, from 0 to 1, if those before it come.
    confidences: list[float] = field(default_factory=list)


class Drafter(Protocol):
    name: str

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        """Up to `limit` tokens that may follow the sequence's `token_ids`."""

    def end(self, sequence: Sequence) -> None:
        """The sequence has ended, and is not asked about again."""
