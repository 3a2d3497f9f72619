"""Who guesses how a text goes on: one interface. A kind of drafter is a file here."""

from collections.abc import Sequence as Listed
from typing import NamedTuple

from engine.schedule.sequence import Sequence
from engine.speculation.costs import DecodeCosts


class Draft(NamedTuple):
    """Tokens that may come next."""

    token_ids: list[int]
    # How sure each is, from 0 to 1, if those before it come.
    confidences: Listed[float]


NO_DRAFT = Draft([], ())


class Drafter:
    name = ""

    def serves(self, sequence: Sequence) -> bool:
        """Whether it may ever have a draft for the sequence, which has just begun to run."""
        return True

    def prepare(self, sequences: list[Sequence], limit: int, costs: DecodeCosts) -> None:
        """These are about to be asked about, for up to `limit` tokens, in steps of such costs.

        For who makes the drafts of all of them together.
        """

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        """Up to `limit` tokens that may follow the sequence's `token_ids`."""
        raise NotImplementedError

    def judge(self, sequence: Sequence, num_drafts: int, num_accepted: int) -> None:
        """What became of drafts that the sequence was given."""

    def end(self, sequence: Sequence) -> None:
        """The sequence has ended, and is not asked about again."""
